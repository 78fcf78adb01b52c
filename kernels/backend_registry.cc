#include "kernels/backend_registry.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"

namespace structkv {

std::vector<std::string_view> BackendNames() { return {"cpu", "reference"}; }

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(std::string_view name) {
  if (name == "auto" || name == "cpu") return cpu::CreateCpuBackend();
  if (name == "reference") return reference::CreateReferenceBackend();
  std::string known = "auto";
  for (std::string_view each : BackendNames()) known.append(", ").append(each);
  return absl::NotFoundError(
      absl::StrCat("backend: \"", std::string(name), "\" is not one of ", known));
}

}  // namespace structkv
