// The transfers of one prompt, or of one stream of a fetch, by an NCCL pair.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/nccl_device.h"
#include "service/transport/nccl/transfer.h"

namespace structkv::client::internal {

// Thread-safe. What it calls is called on the pair's thread, one at a time, until Close().
class PromptTransfers : public std::enable_shared_from_this<PromptTransfers> {
 public:
  using Done = std::function<void(const absl::Status&)>;

  // With keys of its own.
  explicit PromptTransfers(std::shared_ptr<NcclPair> pair);

  // Of a layer's keys and values.
  std::string KeyOf(uint32_t layer) const;
  // Offers a transfer. `after`, a cudaEvent_t, may be null; `hold` is kept until NCCL has let go of
  // the buffers. `done` is told how it ended.
  void Offer(const std::string& key, nccl::Direction direction, std::vector<nccl::Buffer> buffers,
             void* after, std::shared_ptr<void> hold, Done done);
  // Has the pair's thread call it.
  void Post(std::function<void()> call);
  // Takes back what is not under way yet; what is offered from now on is dropped untold.
  void Withdraw();
  // Nothing is called from now on; waits for what is being called.
  void Close();

 private:
  // On the pair's thread.
  void Finished(const std::string& key, const Done& done, const absl::Status& status);
  void Call(const std::function<void()>& call);

  const std::shared_ptr<NcclPair> pair_;
  const std::string prefix_;  // of keys
  absl::Mutex mutex_;
  std::set<std::string> waiting_ ABSL_GUARDED_BY(mutex_);  // keys of transfers that are not over
  bool withdrawn_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Mutex call_mutex_;  // held while something is called
  bool closed_ ABSL_GUARDED_BY(call_mutex_) = false;
};

}  // namespace structkv::client::internal
