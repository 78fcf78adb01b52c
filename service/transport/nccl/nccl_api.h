// NCCL, found at run time: a host without it starts, and says why there is no NCCL transport.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/transport/nccl/nccl_abi.h"

namespace structkv::nccl {

inline constexpr char kDefaultLibrary[] = "libnccl.so.2";
// Versions as NCCL counts them: major * 10000 + minor * 100 + patch. Before 2.18 a non-blocking
// communicator has other rules; another major version is another interface.
inline constexpr int kOldestVersion = 21800;
inline constexpr int kNewestMajor = 2;

// "2.28.9" for 22809.
std::string VersionText(int version);

// Thread-safe, as far as NCCL is: a communicator is one thread's.
class Api {
 public:
  // Loads the library of that name or path; it stays loaded. NOT_FOUND where there is none;
  // FAILED_PRECONDITION where it lacks a function or its version is out of range.
  static absl::StatusOr<std::shared_ptr<const Api>> Load(
      const std::string& library = kDefaultLibrary);

  const Functions& call() const { return functions_; }
  int version() const { return version_; }

  // OK for success and for "in progress"; otherwise UNAVAILABLE: "`what`: NCCL's words". `comm` may
  // be null.
  absl::Status ToStatus(Result result, std::string_view what, Comm* comm = nullptr) const;

 private:
  Api() = default;

  Functions functions_ = {};
  int version_ = 0;
};

}  // namespace structkv::nccl
