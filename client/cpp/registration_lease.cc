#include "client/cpp/registration_lease.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "client/cpp/region_call.h"

namespace structkv::client::internal {
namespace {

constexpr absl::Duration kFirstPause = absl::Milliseconds(20);
constexpr absl::Duration kLastPause = absl::Seconds(1);

// Whether the server has closed it.
bool Unregister(const LeasedRegion& region) {
  v1::UnregisterRegionRequest request;
  request.set_handle(region.handle);
  v1::UnregisterRegionResponse response;
  const absl::Status status =
      CallRegions(region.server, absl::Now() + kRegionCallLimit,
                  [&](v1::Regions::Stub& stub, grpc::ClientContext* context) {
                    return stub.UnregisterRegion(context, request, &response);
                  });
  return status.ok() ? response.use_count() == 0 : absl::IsNotFound(status);
}

// Returns once the server has closed it, or at `end`, when it must have.
void AwaitClosed(const LeasedRegion& region, absl::Time end) {
  absl::Duration pause = kFirstPause;
  while (absl::Now() < end) {
    absl::SleepFor(std::min(pause, end - absl::Now()));
    pause = std::min(2 * pause, kLastPause);
    // Again each time: where the server could not be reached it is registered still.
    if (!region.handle.empty() && Unregister(region)) return;
  }
}

void KeepUntilClosed(LeasedRegion region, absl::Time end) {
  std::thread([region = std::move(region), end] { AwaitClosed(region, end); }).detach();
}

class LeasedRegistration final : public Registration {
 public:
  explicit LeasedRegistration(LeasedRegion region)
      : Registration(region.handle), region_(std::move(region)), thread_([this] { Renew(); }) {}

  ~LeasedRegistration() override {
    over_.Notify();
    thread_.join();
    // Where it fails, the lease ends by itself.
    if (Unregister(region_) || region_.memory == nullptr) return;
    const absl::Time end = end_ + region_.quarantine;
    KeepUntilClosed(std::move(region_), end);
  }

  bool holds() override { return holds_.load(); }

 private:
  void Renew() {
    v1::RenewRegionRequest request;
    request.set_handle(handle());
    request.set_lease_millis(static_cast<uint64_t>(absl::ToInt64Milliseconds(region_.lease)));
    while (!over_.WaitForNotificationWithTimeout(region_.lease / 3)) {
      v1::RenewRegionResponse response;
      const absl::Time asked = absl::Now();
      const absl::Status status =
          CallRegions(region_.server, asked + region_.lease / 3,
                      [&](v1::Regions::Stub& stub, grpc::ClientContext* context) {
                        return stub.RenewRegion(context, request, &response);
                      });
      // Whether or not the server has heard it, the lease may last as long.
      if (!absl::IsNotFound(status)) end_ = absl::Now() + region_.lease;
      if (status.ok()) sure_ = asked + region_.lease;
      // A server that cannot be reached may be back before the lease ends.
      holds_.store(status.ok() || (!absl::IsNotFound(status) && absl::Now() < sure_));
    }
  }

  LeasedRegion region_;
  std::atomic<bool> holds_ = true;
  absl::Notification over_;
  // The thread's, and after its end the destructor's: the lease ends between the two.
  absl::Time sure_ = absl::Now() + region_.lease;
  absl::Time end_ = absl::Now() + region_.lease;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Registration> KeepLease(LeasedRegion region) {
  return std::make_unique<LeasedRegistration>(std::move(region));
}

void Quarantine(LeasedRegion region) {
  const absl::Time end = absl::Now() + region.lease + region.quarantine;
  KeepUntilClosed(std::move(region), end);
}

}  // namespace structkv::client::internal
