#include "client/cli/shared_memory.h"

#include <map>
#include <string>

#include "structkv/region.h"

namespace structkv::cli {

void AddTransportFlag(CLI::App* app, ConnectionFlags* flags) {
  static const auto* const choices = new std::map<std::string, client::TransportChoice>{
      {"auto", client::TransportChoice::kAuto},
      {"inline", client::TransportChoice::kInline},
      {"shm", client::TransportChoice::kSharedMemory},
      {"cuda_ipc", client::TransportChoice::kCudaIpc}};
  app->add_option("--transport", flags->transport,
                  "How tensors travel: auto, inline (in messages), shm (shared memory) or cuda_ipc "
                  "(memory of a GPU); auto takes shared memory where the server has it and runs on "
                  "this host")
      ->transform(CLI::CheckedTransformer(*choices).description(""))
      ->default_str("auto")
      ->group("Where");
  app->add_option("--gpu", flags->gpu, "With cuda_ipc: the GPU, as CUDA counts them")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->group("Where");
  app->add_option("--cuda-library", flags->cuda_library,
                  "With cuda_ipc: name or path of CUDA's driver")
      ->capture_default_str()
      ->group("Where");
}

absl::StatusOr<std::shared_ptr<client::Arena>> MakeArena(const ConnectionFlags& flags,
                                                         uint64_t bytes) {
  if (flags.in_process || flags.transport == client::TransportChoice::kInline) return nullptr;
  client::RegionOptions options;
  options.size_bytes = bytes;
  options.prefault = false;  // with auto it may not be needed
  if (flags.transport == client::TransportChoice::kCudaIpc) {
    options.kind = client::RegionKind::kGpu;
    options.gpu = flags.gpu;
    options.cuda_library = flags.cuda_library;
  }
  auto region = client::Region::Create(options);
  if (region.ok()) return std::make_shared<client::Arena>(*std::move(region));
  if (flags.transport == client::TransportChoice::kAuto) return nullptr;
  return region.status();
}

void UseArena(const std::shared_ptr<client::Arena>& arena, client::SessionOptions* options) {
  if (arena == nullptr) return;
  options->regions = {arena->region()};
  options->staging = arena;
  if (!arena->region()->on_gpu()) options->results = arena;
}

}  // namespace structkv::cli
