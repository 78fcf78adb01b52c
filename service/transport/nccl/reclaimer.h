// Gives communicators back. NCCL does that in the calling thread, also for non-blocking ones, and
// an abort may take its time: so it happens on short-lived threads, one for each group, to which
// the GPU's thread has left its communicators.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "service/transport/nccl/communicator.h"
#include "service/transport/nccl/device_api.h"
#include "service/transport/nccl/nccl_api.h"

namespace structkv::nccl {

// Thread-safe.
class Reclaimer {
 public:
  // `on_gone` is called on such a thread with every communicator of a group; it must be callable
  // after this object is gone.
  Reclaimer(std::shared_ptr<const Api> api, const DeviceApi& device_api, int device,
            std::function<void(const std::vector<PeerId>&)> on_gone);

  // Aborts all of them in one NCCL group: two that are hung may wait for each other's end. Or (not
  // `abort`) destroys those that were finalized. All of one kind. Lets go of what they hold.
  void Take(std::vector<Remains> group);

  // False where some are still being given back after `limit`; their threads then go on alone.
  bool WaitUntilEmpty(absl::Duration limit);

 private:
  struct Shared;

  const std::shared_ptr<Shared> shared_;
};

}  // namespace structkv::nccl
