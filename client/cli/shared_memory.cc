#include "client/cli/shared_memory.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "structkv/region.h"

namespace structkv::cli {

void AddTransportFlag(CLI::App* app, ConnectionFlags* flags) {
  constexpr char kGroup[] = "Where";
  static const auto* const choices = new std::map<std::string, client::TransportChoice>{
      {"auto", client::TransportChoice::kAuto},
      {"inline", client::TransportChoice::kInline},
      {"shm", client::TransportChoice::kSharedMemory},
      {"cuda_ipc", client::TransportChoice::kCudaIpc},
      {"nccl", client::TransportChoice::kNccl}};
  app->add_option(
         "--transport", flags->transport,
         "How tensors travel: auto, inline (in messages), shm (shared memory), cuda_ipc "
         "(memory of a GPU, on the same host) or nccl (from GPU to GPU); auto takes shared "
         "memory where the server has it and runs on this host")
      ->transform(CLI::CheckedTransformer(*choices).description(""))
      ->default_str("auto")
      ->group(kGroup);
  app->add_option("--gpu", flags->gpu, "With cuda_ipc and nccl: the GPU, as CUDA counts them")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->group(kGroup);
  app->add_option("--cuda-library", flags->cuda_library,
                  "With cuda_ipc and nccl: name or path of CUDA's driver")
      ->capture_default_str()
      ->group(kGroup);
  app->add_option("--nccl-library", flags->nccl_library, "With nccl: name or path of NCCL")
      ->capture_default_str()
      ->group(kGroup);
}

std::string TransportText(v1::Transport transport) {
  return absl::AsciiStrToLower(absl::StripPrefix(v1::Transport_Name(transport), "TRANSPORT_"));
}

absl::StatusOr<SharedMemory> MakeSharedMemory(const ConnectionFlags& flags, uint64_t bytes) {
  using client::TransportChoice;
  SharedMemory memory;
  if (flags.in_process || flags.transport == TransportChoice::kInline) return memory;
  client::RegionOptions options;
  options.size_bytes = bytes;
  options.prefault = false;  // with auto it may not be needed
  if (flags.transport == TransportChoice::kCudaIpc || flags.transport == TransportChoice::kNccl) {
    options.kind = client::RegionKind::kGpu;
    options.gpu = flags.gpu;
    options.cuda_library = flags.cuda_library;
  }
  if (flags.transport == TransportChoice::kNccl) {
    auto nccl = client::NcclGpu::Open(
        {.gpu = flags.gpu, .nccl_library = flags.nccl_library, .cuda_library = flags.cuda_library});
    if (!nccl.ok()) return nccl.status();
    memory.nccl = *std::move(nccl);
  }
  auto region = client::Region::Create(options);
  if (region.ok()) {
    memory.arena = std::make_shared<client::Arena>(*std::move(region));
  } else if (flags.transport != TransportChoice::kAuto) {
    return region.status();
  }
  return memory;
}

void UseSharedMemory(const SharedMemory& memory, client::SessionOptions* options) {
  if (memory.arena == nullptr) return;
  options->regions = {memory.arena->region()};
  options->staging = memory.arena;
  options->results = memory.arena;
  options->nccl = memory.nccl;
}

absl::StatusOr<client::LayerResult> ToHost(const SharedMemory& memory, client::LayerResult layer) {
  if (!memory.on_gpu()) return layer;
  const client::Region& region = *memory.arena->region();
  for (client::Bytes* rows : {&layer.keys, &layer.values}) {
    const auto at = region.OffsetOf(rows->span());
    if (!at.has_value()) continue;
    auto copy = std::make_shared<std::vector<std::byte>>(rows->size());
    if (absl::Status status = region.Read(*at, absl::MakeSpan(*copy)); !status.ok()) return status;
    *rows = client::Bytes(copy->data(), copy->size(), copy);
  }
  return layer;
}

}  // namespace structkv::cli
