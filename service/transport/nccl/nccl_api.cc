#include "service/transport/nccl/nccl_api.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"
#include "service/transport/nccl/symbols.h"

namespace structkv::nccl {

std::string VersionText(int version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

absl::StatusOr<std::shared_ptr<const Api>> Api::Load(const std::string& library) {
  // Never closed: NCCL has threads of its own.
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return absl::NotFoundError(absl::StrCat("no NCCL: ", dlerror()));
  std::shared_ptr<Api> api(new Api());
  Functions& functions = api->functions_;
  Symbols symbols(handle);
  symbols.Find("ncclGetVersion", &functions.get_version);
  symbols.Find("ncclGetUniqueId", &functions.get_unique_id);
  symbols.Find("ncclCommInitRankConfig", &functions.comm_init_rank_config);
  symbols.Find("ncclCommFinalize", &functions.comm_finalize);
  symbols.Find("ncclCommDestroy", &functions.comm_destroy);
  symbols.Find("ncclCommAbort", &functions.comm_abort);
  symbols.Find("ncclCommGetAsyncError", &functions.comm_get_async_error);
  symbols.Find("ncclGetErrorString", &functions.get_error_string);
  symbols.Find("ncclGetLastError", &functions.get_last_error);
  symbols.Find("ncclSend", &functions.send);
  symbols.Find("ncclRecv", &functions.receive);
  symbols.Find("ncclGroupStart", &functions.group_start);
  symbols.Find("ncclGroupEnd", &functions.group_end);
  if (functions.get_version == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(library, " is no NCCL: no ncclGetVersion"));
  }
  if (functions.get_version(&api->version_) != Result::kSuccess) {
    return absl::FailedPreconditionError(absl::StrCat(library, " does not say its version"));
  }
  if (api->version_ < kOldestVersion || api->version_ / 10000 > kNewestMajor) {
    return absl::FailedPreconditionError(absl::StrCat(
        library, " is NCCL ", VersionText(api->version_), "; ", VersionText(kOldestVersion),
        " or newer with major version ", kNewestMajor, " is needed"));
  }
  if (symbols.missing() != nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(
        library, " (NCCL ", VersionText(api->version_), ") has no ", symbols.missing()));
  }
  return api;
}

absl::Status Api::ToStatus(Result result, std::string_view what, Comm* comm) const {
  if (result == Result::kSuccess || result == Result::kInProgress) return absl::OkStatus();
  const char* const last = functions_.get_last_error(comm);
  return absl::UnavailableError(absl::StrCat(
      absl::string_view(what.data(), what.size()), ": ", functions_.get_error_string(result),
      last != nullptr && *last != 0 ? "; " : "", last != nullptr ? last : ""));
}

}  // namespace structkv::nccl
