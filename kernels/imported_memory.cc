#include "kernels/imported_memory.h"

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"

namespace structkv {

absl::StatusOr<std::unique_ptr<ImportedMemory>> Backend::Import(
    const ExportedMemory& /*exported*/) const {
  return absl::FailedPreconditionError(
      absl::StrCat("the backend ", std::string(name()), " computes in the host's memory"));
}

absl::StatusOr<std::shared_ptr<std::byte>> Backend::Reserve(int gpu, int64_t /*bytes*/) const {
  return absl::FailedPreconditionError(
      absl::StrCat("the backend ", std::string(name()), " does not compute on GPU ", gpu));
}

}  // namespace structkv
