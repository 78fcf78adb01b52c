// The streams of a server: counts them, ends them all, and lets each check its own time limits at
// regular moments. Streams keep timestamps and start no timers of their own, so nothing is paid for
// limits per message.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "service/rpc/stream_observer.h"

namespace structkv::rpc {

// Monotonic time in nanoseconds.
int64_t SteadyNanos();

// A stream as the set sees it.
class Stream {
 public:
  virtual ~Stream() = default;
  // Looks at its limits, `now` as of SteadyNanos(). On the set's thread; must not block.
  virtual void CheckLimits(int64_t now) = 0;
  // Ends it, if it still runs.
  virtual void End(const absl::Status& status) = 0;
  // Adds the prompts that run on it.
  virtual void Report(std::vector<PromptReport>* /*prompts*/) const {}
};

// Thread-safe. Runs one thread. Streams may outlive the set's calls, but not call into a set that
// is gone.
class StreamSet {
 public:
  // Calls CheckLimits, and `also` where it is set, about every `tick`.
  explicit StreamSet(absl::Duration tick, std::function<void()> also = nullptr);
  ~StreamSet();
  StreamSet(const StreamSet&) = delete;
  StreamSet& operator=(const StreamSet&) = delete;

  void Add(const std::shared_ptr<Stream>& stream);
  void Remove(const Stream* stream);

  int64_t size() const;
  // The prompts that run now, in no order.
  std::vector<PromptReport> Report() const;
  // Ends every stream that runs now.
  void EndAll(const absl::Status& status);
  // What EndAll ended them with last, for a stream that was added since: nobody else ends that one.
  // OK before.
  absl::Status ended() const;
  // Waits until no stream is left; false at the limit.
  bool WaitUntilEmpty(absl::Duration limit);

 private:
  class Ticker;
  void Tick();
  // Those that are there now; they may go on to end.
  std::vector<std::shared_ptr<Stream>> All() const;

  const std::function<void()> also_;
  mutable absl::Mutex mutex_;
  std::unordered_map<const Stream*, std::weak_ptr<Stream>> streams_ ABSL_GUARDED_BY(mutex_);
  absl::Status ended_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<Ticker> ticker_;
  std::thread thread_;
};

}  // namespace structkv::rpc
