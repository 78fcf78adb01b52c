#include <algorithm>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "structkv/client.h"
#include "structkv/held_cache.h"

namespace structkv::client {

class CacheLease::Impl {
 public:
  Impl(Client* client, std::string handle, absl::Duration lease, HeldCallOptions options)
      : client_(client),
        handle_(std::move(handle)),
        options_(std::move(options)),
        beat_(lease / 3),
        thread_([this] { Run(); }) {}

  ~Impl() {
    {
      absl::MutexLock lock(&mutex_);
      stopped_ = true;
    }
    thread_.join();
  }

  absl::Status status() const {
    absl::MutexLock lock(&mutex_);
    return status_;
  }

  int64_t renewals() const {
    absl::MutexLock lock(&mutex_);
    return renewals_;
  }

 private:
  void Run() {
    absl::MutexLock lock(&mutex_);
    while (!mutex_.AwaitWithTimeout(absl::Condition(&stopped_), beat_)) {
      HeldCallOptions options = options_;
      // A renewal that comes no more leaves time for another one.
      options.timeout = std::min(options.timeout, std::max(beat_, absl::Milliseconds(100)));
      mutex_.Unlock();
      const absl::Status status = client_->RenewCache(handle_, std::nullopt, options).status();
      mutex_.Lock();
      status_ = status;
      if (status.ok()) ++renewals_;
      if (absl::IsNotFound(status)) return;
    }
  }

  Client* const client_;
  const std::string handle_;
  const HeldCallOptions options_;
  const absl::Duration beat_;
  mutable absl::Mutex mutex_;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  int64_t renewals_ ABSL_GUARDED_BY(mutex_) = 0;
  std::thread thread_;  // last: it uses the above
};

CacheLease::CacheLease(Client* client, std::string handle, absl::Duration lease,
                       const HeldCallOptions& options)
    : impl_(std::make_unique<Impl>(client, std::move(handle), lease, options)) {}
CacheLease::~CacheLease() = default;
absl::Status CacheLease::status() const { return impl_->status(); }
int64_t CacheLease::renewals() const { return impl_->renewals(); }

}  // namespace structkv::client
