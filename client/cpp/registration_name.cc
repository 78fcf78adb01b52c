// Registers a file of /dev/shm by its name.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cpp/region_call.h"
#include "client/cpp/registration.h"
#include "client/cpp/registration_lease.h"

namespace structkv::client::internal {
namespace {

std::string NewName() {
  std::random_device random;
  const auto word = [&random] { return (uint64_t{random()} << 32) | random(); };
  const uint64_t high = word();
  return absl::StrFormat("structkv.%016x%016x", high, word());
}

}  // namespace

absl::StatusOr<std::unique_ptr<Registration>> RegisterNamed(const RegionServer& server,
                                                            const RegionOptions& options,
                                                            int descriptor, absl::Time deadline) {
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
      CallRegions(server, deadline, [&](v1::Regions::Stub& stub, grpc::ClientContext* context) {
        return stub.RegisterRegion(context, request, &response);
      });
  if (!status.ok()) {
    unlink(path.c_str());
    return status;
  }
  return KeepLease({.server = server,
                    .handle = response.handle(),
                    .lease = absl::Milliseconds(response.lease_millis())});
}

}  // namespace structkv::client::internal
