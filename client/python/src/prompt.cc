#include "prompt.h"

#include <cstdint>

#include "absl/strings/str_cat.h"

namespace structkv::python {

std::string DeviceName(std::optional<int> gpu) {
  return gpu.has_value() ? absl::StrCat("cuda:", *gpu) : "cpu";
}

void GpuPlaces::Add(const client::Region& region) {
  if (!region.on_gpu()) return;
  for (const Place& place : places_) {
    if (place.data == region.data()) return;
  }
  places_.push_back({region.data(), region.size(), region.options().gpu});
}

std::optional<int> GpuPlaces::Find(absl::Span<const std::byte> bytes) const {
  const auto at = reinterpret_cast<uintptr_t>(bytes.data());
  for (const Place& place : places_) {
    const auto begin = reinterpret_cast<uintptr_t>(place.data);
    if (!bytes.empty() && at >= begin && bytes.size() <= place.size &&
        at - begin <= place.size - bytes.size()) {
      return place.gpu;
    }
  }
  return std::nullopt;
}

std::string Prompt::WhyNotFromGpu(v1::Tensor tensor, absl::Span<const std::byte> bytes,
                                  int device) const {
  if (bytes.empty() || gpu.Find(bytes).has_value()) return "";
  if (gpu_region == nullptr) {
    return absl::StrCat(
        "no region of the session is memory of a GPU: copy it to the host, or give ",
        "SessionOptions.regions one of ", DeviceName(device), " that it lies in");
  }
  // Of another driver than the regions' it would be taken for the host's, and read.
  if (!gpu_region->IsOnGpu(bytes.data())) {
    return "the CUDA of the session's regions (Region, cuda_library) knows no GPU's memory there";
  }
  const bool rows = tensor == v1::TENSOR_KEYS || tensor == v1::TENSOR_VALUES;
  if (rows && opened.transport() == v1::TRANSPORT_CUDA_IPC && !has_staging) {
    return absl::StrCat("it lies in none of the session's regions (", gpu.size(), " of ",
                        DeviceName(gpu_region->options().gpu),
                        "), where the server reads keys and values, and there is no ",
                        "SessionOptions.staging that it could be copied to");
  }
  return "";
}

}  // namespace structkv::python
