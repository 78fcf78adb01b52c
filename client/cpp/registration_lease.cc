// Registers a file of /dev/shm by its name, and renews its lease.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/notification.h"
#include "client/cpp/region_call.h"
#include "client/cpp/registration.h"

namespace structkv::client::internal {
namespace {

class LeasedRegistration final : public Registration {
 public:
  LeasedRegistration(RegionServer server, std::string handle, absl::Duration lease)
      : Registration(std::move(handle)),
        server_(std::move(server)),
        lease_(lease),
        thread_([this] { Renew(); }) {}

  ~LeasedRegistration() override {
    over_.Notify();
    thread_.join();
    v1::UnregisterRegionRequest request;
    request.set_handle(handle());
    v1::UnregisterRegionResponse response;
    // Where it fails, the lease ends by itself.
    CallRegions(server_, absl::Now() + kRegionCallLimit,
                [&](v1::Regions::Stub& stub, grpc::ClientContext* context) {
                  return stub.UnregisterRegion(context, request, &response);
                })
        .IgnoreError();
  }

  bool holds() override { return holds_.load(); }

 private:
  void Renew() {
    v1::RenewRegionRequest request;
    request.set_handle(handle());
    request.set_lease_millis(static_cast<uint64_t>(absl::ToInt64Milliseconds(lease_)));
    absl::Time end = absl::Now() + lease_;
    while (!over_.WaitForNotificationWithTimeout(lease_ / 3)) {
      v1::RenewRegionResponse response;
      const absl::Time asked = absl::Now();
      const absl::Status status = CallRegions(
          server_, asked + lease_ / 3, [&](v1::Regions::Stub& stub, grpc::ClientContext* context) {
            return stub.RenewRegion(context, request, &response);
          });
      if (status.ok()) end = asked + lease_;
      // A server that cannot be reached may be back before the lease ends.
      holds_.store(status.ok() || (!absl::IsNotFound(status) && absl::Now() < end));
    }
  }

  const RegionServer server_;
  const absl::Duration lease_;
  std::atomic<bool> holds_ = true;
  absl::Notification over_;
  std::thread thread_;
};

std::string NewName() {
  std::random_device random;
  const auto word = [&random] { return (uint64_t{random()} << 32) | random(); };
  const uint64_t high = word();
  return absl::StrFormat("structkv.%016x%016x", high, word());
}

}  // namespace

absl::StatusOr<std::unique_ptr<Registration>> RegisterNamed(const RegionServer& server,
                                                            const RegionOptions& options,
                                                            int descriptor) {
  const std::string name = NewName();
  const std::string path = absl::StrCat("/dev/shm/", name);
  const std::string self = absl::StrCat("/proc/self/fd/", descriptor);
  // Held, so that the server does not take it for what a dead process has left; should this process
  // die before the file is registered, the server removes it.
  if (flock(descriptor, LOCK_EX | LOCK_NB) != 0 ||
      linkat(AT_FDCWD, self.c_str(), AT_FDCWD, path.c_str(), AT_SYMLINK_FOLLOW) != 0) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": ", strerror(errno)));
  }
  v1::RegisterRegionRequest request;
  request.set_name(name);
  request.set_size_bytes(options.size_bytes);
  request.set_writable(options.writable);
  if (options.lease > absl::ZeroDuration()) {
    request.set_lease_millis(static_cast<uint64_t>(absl::ToInt64Milliseconds(options.lease)));
  }
  v1::RegisterRegionResponse response;
  const absl::Status status =
      CallRegions(server, absl::Now() + kRegionCallLimit,
                  [&](v1::Regions::Stub& stub, grpc::ClientContext* context) {
                    return stub.RegisterRegion(context, request, &response);
                  });
  if (!status.ok()) {
    unlink(path.c_str());
    return status;
  }
  return std::make_unique<LeasedRegistration>(server, response.handle(),
                                              absl::Milliseconds(response.lease_millis()));
}

}  // namespace structkv::client::internal
