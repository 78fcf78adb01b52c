// The layers of a fetch whose keys and values come by an NCCL pair.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cpp/nccl_device.h"
#include "client/cpp/prompt_transfers.h"
#include "structkv/result.h"

namespace structkv::client::internal {

// Of one stream. Thread-safe.
class FetchTransfers {
 public:
  // `failed` is called, on the pair's thread, when a transfer fails.
  FetchTransfers(std::shared_ptr<NcclPair> pair, std::function<void()> failed);
  ~FetchTransfers() { Abandon(); }

  // Has the keys and values of a layer received where they belong. Without a key nothing of the
  // layer is to come: it has its turn.
  void Add(LayerResult layer, const std::string& key);
  // Those that are there, each once, in the order in which they were added.
  std::vector<LayerResult> TakeArrived();
  // Waits until all are there. The first failure, or DEADLINE_EXCEEDED.
  absl::Status WaitForAll(absl::Time deadline);
  // How the first transfer that failed did.
  absl::Status status() const;
  // Takes back what is not under way. Nothing is called or arrives from now on.
  void Abandon();
  // Waits until NCCL has let go of all memory. False where that takes longer than `limit`.
  bool WaitUntilLetGo(absl::Duration limit) const;

 private:
  struct Arriving {
    LayerResult layer;
    bool arrived = false;
  };
  // Outlives this object in the transfers that NCCL has.
  struct State {
    mutable absl::Mutex mutex;
    std::deque<std::shared_ptr<Arriving>> arriving ABSL_GUARDED_BY(mutex);
    absl::Status status ABSL_GUARDED_BY(mutex);
    int64_t in_use ABSL_GUARDED_BY(mutex) = 0;  // transfers whose memory NCCL may touch
  };

  const std::shared_ptr<State> state_ = std::make_shared<State>();
  const std::function<void()> failed_;
  const std::shared_ptr<PromptTransfers> transfers_;
};

}  // namespace structkv::client::internal
