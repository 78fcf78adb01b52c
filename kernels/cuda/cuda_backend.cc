#include "kernels/cuda/cuda_backend.h"

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend_parts.h"
#include "kernels/cuda/cuda_error.h"
#include "kernels/cuda/device_vectors.h"
#include "kernels/cuda/devices.h"
#include "kernels/cuda/gather_call.h"
#include "kernels/cuda/host_pinning.h"
#include "kernels/cuda/ipc_memory.h"
#include "kernels/cuda/layer_call.h"
#include "kernels/cuda/saliency_call.h"
#include "kernels/cuda/staged.h"
#include "kernels/cuda/vector_calls.h"
#include "kernels/saliency_checks.h"

namespace structkv::cuda {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::unique_ptr<Devices> devices, std::unique_ptr<Backend> host, CudaEvents events)
      : devices_(std::move(devices)),
        imports_(std::make_shared<IpcImports>(*devices_)),
        host_(std::move(host)),
        fell_back_(std::move(events.fell_back)),
        pinning_(MakeHostPinning(devices_->all().front()->index(), std::move(events.not_pinned))) {}

  std::string_view name() const override { return "cuda"; }
  std::string device() const override {
    std::string text;
    for (const std::unique_ptr<Device>& device : devices_->all()) {
      absl::StrAppend(&text, text.empty() ? "" : "; ", device->name(), ": ", device->model(), ", ",
                      (device->pool_bytes() + device->resident_bytes()) / kMiB, " MiB");
      const int64_t apart = device->reservable_bytes();
      if (apart > 0) absl::StrAppend(&text, " and ", apart / kMiB, " MiB set apart");
    }
    return text;
  }
  const BackendCapabilities& capabilities() const override { return capabilities_; }
  bool KeepsHalfWeights(const SaliencyParams& params) const override {
    return params.lse == nullptr;
  }
  absl::Status Health() const override { return devices_->Health(); }

  // Staging memory is not the call's, and the rest is the device's.
  int64_t SaliencyScratchBytes(const SaliencyParams& /*params*/) const override {
    return kCallBytes;
  }
  absl::Status CheckRoom(const SaliencyParams& params, bool keys_on_device) const override {
    return cuda::CheckRoom(*devices_, params, keys_on_device);
  }

  absl::Status Saliency(const SaliencyParams& params, float* out, BadStatistic* bad,
                        ParallelFor /*parallel*/) const override {
    if (absl::Status status = CheckSaliencyParams(params, capabilities_); !status.ok()) {
      return status;
    }
    return cuda::Saliency(*devices_, params, out, bad);
  }

  void SumHeads(const float* per_head, int64_t heads, int64_t tokens, float* out,
                ParallelFor parallel) const override {
    if (tokens == 0 || Done(cuda::SumHeads(*devices_, per_head, heads, tokens, out))) return;
    host_->SumHeads(per_head, heads, tokens, out, parallel);
  }

  std::optional<BadStatistic> FindBad(const float* values, int64_t heads, int64_t tokens,
                                      ParallelFor parallel) const override {
    if (tokens == 0) return std::nullopt;
    const auto bad = cuda::FindBad(*devices_, values, heads, tokens);
    if (bad.ok()) return *bad;
    return Done(bad.status()) ? std::nullopt : host_->FindBad(values, heads, tokens, parallel);
  }

  void Pool(const float* in, int64_t tokens, Pooling pooling, int64_t kernel,
            float* out) const override {
    if (tokens == 0 || Done(cuda::Pool(*devices_, in, tokens, pooling, kernel, out))) return;
    host_->Pool(in, tokens, pooling, kernel, out);
  }

  SaliencySums Sums(const float* scores, int64_t tokens, int64_t top_count,
                    ParallelFor parallel) const override {
    if (tokens == 0) return {};
    const absl::StatusOr<SaliencySums> sums = cuda::Sums(*devices_, scores, tokens, top_count);
    if (sums.ok()) return *sums;
    return Done(sums.status()) ? SaliencySums() : host_->Sums(scores, tokens, top_count, parallel);
  }

  void Accumulate(float decay, const float* saliency, float* centrality, int64_t tokens,
                  ParallelFor parallel) const override {
    if (tokens == 0 || Done(cuda::Accumulate(*devices_, decay, saliency, centrality, tokens))) {
      return;
    }
    host_->Accumulate(decay, saliency, centrality, tokens, parallel);
  }

  void Select(const structkv::SelectParams& params, int32_t* positions) const override {
    if (params.keep == 0 || Done(cuda::Select(*devices_, params, positions))) return;
    host_->Select(params, positions);
  }

  absl::Status Gather(const TensorView& source, const int32_t* positions, bool per_head,
                      const MutableTensorView& destination, ParallelFor parallel) const override {
    if (destination.tokens == 0 || source.heads == 0) return absl::OkStatus();
    absl::Status status = cuda::Gather(*devices_, source, positions, per_head, destination);
    if (status.ok() || !HostReaches(source, destination) || Done(status)) return status;
    return host_->Gather(source, positions, per_head, destination, parallel);
  }

  absl::Status GatherRotated(const TensorView& source, const int32_t* rows, bool per_head,
                             const RotationParams& rotation, const MutableTensorView& destination,
                             ParallelFor parallel) const override {
    if (destination.tokens == 0 || source.heads == 0) return absl::OkStatus();
    absl::Status status =
        cuda::GatherRotated(*devices_, source, rows, per_head, rotation, destination);
    if (status.ok() || !HostReaches(source, destination) || Done(status)) return status;
    return host_->GatherRotated(source, rows, per_head, rotation, destination, parallel);
  }

  absl::Status RunLayer(const LayerPass& pass, BadStatistic* bad,
                        ParallelFor parallel) const override {
    if (absl::Status status = CheckSaliencyParams(pass.saliency, capabilities_); !status.ok()) {
      return status;
    }
    std::vector<const LayerPass::Rows*> left;
    absl::Status status = cuda::RunLayer(*devices_, pass, bad, &left);
    for (const LayerPass::Rows* rows : left) {
      if (!status.ok()) break;
      const int32_t* const positions =
          pass.positions + (pass.per_head ? rows->first_head * pass.keep : 0);
      // What is the host's and stays there need not cross the bus.
      status =
          HostReaches(rows->source, rows->destination)
              ? host_->Gather(rows->source, positions, pass.per_head, rows->destination, parallel)
              : Gather(rows->source, positions, pass.per_head, rows->destination, parallel);
    }
    return status;
  }

  std::unique_ptr<StagedLayer> Stage(const SaliencyParams& params, int gpu) const override {
    if (!CheckSaliencyParams(params, capabilities_).ok()) return nullptr;
    return StageKeys(*devices_, params, gpu);
  }

  std::unique_ptr<ResidentVectors> Resident(int64_t count, int64_t tokens, const void* keys,
                                            const StagedLayer* staged) const override {
    const absl::StatusOr<Place> place = devices_->PlaceOf(keys);
    const int gpu = staged != nullptr ? static_cast<const Staged*>(staged)->device().index()
                    : place.ok()      ? place->device
                                      : -1;
    std::unique_ptr<ResidentVectors> vectors =
        cuda::DeviceVectors::TryMake(*devices_, gpu, count, tokens);
    return vectors != nullptr ? std::move(vectors) : HostVectors(count, tokens, *host_);
  }

  absl::Status Zero(void* to, int64_t bytes) const override {
    if (bytes == 0) return absl::OkStatus();
    const absl::StatusOr<Place> place = devices_->PlaceOf(to);
    if (!place.ok()) return place.status();
    return place->on_device() ? cuda::Zero(*devices_, place->device, to, bytes)
                              : host_->Zero(to, bytes);
  }

  std::vector<int> gpus() const override {
    std::vector<int> indexes;
    for (const std::unique_ptr<Device>& device : devices_->all()) {
      indexes.push_back(device->index());
    }
    return indexes;
  }
  absl::StatusOr<std::shared_ptr<std::byte>> Reserve(int gpu, int64_t bytes) const override {
    Device* const device = devices_->Find(gpu);
    return device == nullptr ? Backend::Reserve(gpu, bytes) : device->Reserve(bytes);
  }
  int64_t reservable_bytes(int gpu) const override {
    const Device* const device = devices_->Find(gpu);
    return device == nullptr ? 0 : device->reservable_bytes();
  }

  absl::Status Fill(void* to, int64_t bytes, FillRun fill) const override {
    if (bytes == 0) return absl::OkStatus();
    const absl::StatusOr<Place> place = devices_->PlaceOf(to);
    if (!place.ok()) return place.status();
    return place->on_device() ? cuda::Fill(*devices_, place->device, to, bytes, fill)
                              : host_->Fill(to, bytes, fill);
  }

  HostPinning host_pinning() const override { return pinning_; }

  BackendStats stats() const override {
    BackendStats stats;
    for (const std::unique_ptr<Device>& device : devices_->all()) {
      const auto pool = [](int64_t bytes, int64_t free) {
        return BackendStats::Pool{bytes, bytes - free};
      };
      stats.gpus.push_back(
          {.index = device->index(),
           .calls = pool(device->pool_bytes(), device->free_bytes()),
           .resident = pool(device->resident_bytes(), device->free_resident_bytes()),
           .apart = pool(device->apart_bytes(), device->free_apart_bytes())});
    }
    stats.open_imports = imports_->open();
    stats.errors = CountedErrors();
    return stats;
  }

  absl::StatusOr<std::unique_ptr<ImportedMemory>> Import(
      const ExportedMemory& exported) const override {
    if (absl::Status status = Health(); !status.ok()) return status;
    return imports_->Import(exported);
  }

 private:
  // What a call keeps on the heap, and more.
  static constexpr int64_t kCallBytes = 4096;

  // Whether the CPU can gather in place of a device.
  bool HostReaches(const TensorView& source, const MutableTensorView& destination) const {
    for (const void* data : {source.data, static_cast<const void*>(destination.data)}) {
      const absl::StatusOr<Place> place = devices_->PlaceOf(data);
      if (!place.ok() || place->on_device()) return false;
    }
    return true;
  }

  // Whether an operation without a status has nothing left to do: it went well, or the backend is
  // lost and its result does not matter.
  bool Done(const absl::Status& status) const {
    if (status.ok() || !Health().ok()) return true;
    if (fell_back_ && !has_fallen_back_.exchange(true)) fell_back_(status);
    return false;
  }

  const std::unique_ptr<Devices> devices_;
  const std::shared_ptr<IpcImports> imports_;
  // Does what a device has no room for.
  const std::unique_ptr<Backend> host_;
  const std::function<void(const absl::Status&)> fell_back_;
  const HostPinning pinning_;
  mutable std::atomic<bool> has_fallen_back_{false};
  const BackendCapabilities capabilities_ = {
      .dtypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3, DType::kF8E5M2},
      .layouts = {Layout::kHeadTokenDim, Layout::kTokenHeadDim},
      .paged = true,
      .device_memory = true,
      .whole_layers = true,
  };
};

}  // namespace

std::unique_ptr<Backend> MakeCudaBackend(std::unique_ptr<Devices> devices,
                                         std::unique_ptr<Backend> host, CudaEvents events) {
  return std::make_unique<CudaBackend>(std::move(devices), std::move(host), std::move(events));
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(CudaOptions options) {
  absl::StatusOr<std::unique_ptr<Backend>> host = cpu::CreateCpuBackend();
  if (!host.ok()) return host.status();
  absl::StatusOr<std::unique_ptr<Devices>> devices = Devices::Open(
      {.memory_bytes = options.device_memory_bytes, .reserve_bytes = options.reserve_bytes});
  if (!devices.ok()) return devices.status();
  return MakeCudaBackend(*std::move(devices), *std::move(host), std::move(options.events));
}

}  // namespace structkv::cuda
