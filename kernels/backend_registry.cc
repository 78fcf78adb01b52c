#include "kernels/backend_registry.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/reference/reference_backend.h"

namespace structkv {
namespace {

#ifdef STRUCTKV_HAVE_CUDA
constexpr bool kHasCuda = true;
absl::StatusOr<std::unique_ptr<Backend>> CreateCuda(BackendOptions options) {
  cuda::CudaOptions cuda = {.device_memory_bytes = options.device_memory_bytes,
                            .reserve_bytes = options.reserve_bytes};
  if (options.warn) {
    cuda.events.fell_back = [warn = options.warn](const absl::Status& status) {
      warn(absl::StrCat("the CPU does what a GPU could not: ", status.message()));
    };
    cuda.events.not_pinned = [warn = std::move(options.warn)](const absl::Status& status) {
      warn(absl::StrCat("tensors are received in pageable memory: ", status.message()));
    };
  }
  return cuda::CreateCudaBackend(std::move(cuda));
}
#else
constexpr bool kHasCuda = false;
absl::StatusOr<std::unique_ptr<Backend>> CreateCuda(BackendOptions /*options*/) {
  return absl::NotFoundError("built without CUDA");
}
#endif

absl::StatusOr<ChosenBackend> Named(absl::StatusOr<std::unique_ptr<Backend>> backend) {
  if (!backend.ok()) return backend.status();
  return ChosenBackend{*std::move(backend), "asked for"};
}

}  // namespace

std::vector<std::string_view> BackendNames() {
  if (kHasCuda) return {"cuda", "cpu", "reference"};
  return {"cpu", "reference"};
}

absl::StatusOr<ChosenBackend> ChooseBackend(std::string_view name, BackendOptions options) {
  if (name == "auto") {
    absl::StatusOr<std::unique_ptr<Backend>> best = CreateCuda(std::move(options));
    if (best.ok()) return ChosenBackend{*std::move(best), "the best of this machine"};
    absl::StatusOr<std::unique_ptr<Backend>> host = cpu::CreateCpuBackend();
    if (!host.ok()) return host.status();
    return ChosenBackend{*std::move(host),
                         absl::StrCat(best.status().message(), "; serving with cpu")};
  }
  if (name == "cuda" && kHasCuda) return Named(CreateCuda(std::move(options)));
  if (name == "cpu") return Named(cpu::CreateCpuBackend());
  if (name == "reference") return Named(reference::CreateReferenceBackend());
  std::string known = "auto";
  for (std::string_view each : BackendNames()) known.append(", ").append(each);
  return absl::NotFoundError(
      absl::StrCat("backend: \"", std::string(name), "\" is not one of ", known));
}

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(std::string_view name) {
  absl::StatusOr<ChosenBackend> chosen = ChooseBackend(name);
  if (!chosen.ok()) return chosen.status();
  return std::move(chosen->backend);
}

}  // namespace structkv
