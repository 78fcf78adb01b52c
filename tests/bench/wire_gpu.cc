#include "tests/bench/wire_gpu.h"

#include <chrono>
#include <cstdlib>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/cpp/cuda_driver.h"
#include "structkv/region.h"
#include "tests/bench/wire_nccl.h"
#include "tests/bench/wire_peer.h"
#include "tests/bench/wire_prompt.h"
#include "tests/testing/process.h"

namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;
using client::internal::CudaDevice;

constexpr char kCudaIpc[] = "CUDA IPC";
constexpr char kNccl[] = "NCCL";

// For a process that is to see one GPU alone, which is number `gpu` here.
std::string VisibleDevices(int gpu) {
  const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES");  // NOLINT(concurrency-mt-unsafe)
  if (visible == nullptr) return std::to_string(gpu);
  const std::vector<std::string> all = absl::StrSplit(visible, ',');
  const auto index = static_cast<size_t>(gpu);
  return index < all.size() ? all[index] : std::to_string(gpu);
}

std::string LastLine(absl::string_view text) {
  text = absl::StripTrailingAsciiWhitespace(text);
  return std::string(text.substr(text.rfind('\n') + 1));
}

// As many bytes as `bytes`, from one place of a GPU's memory to another.
class BareCopy {
 public:
  static absl::StatusOr<std::shared_ptr<BareCopy>> Make(const GpuOptions& options, uint64_t bytes) {
    auto copy = std::make_shared<BareCopy>();
    auto device = CudaDevice::Open(options.cuda_library, options.gpu);
    if (!device.ok()) return device.status();
    copy->device_ = *std::move(device);
    copy->bytes_ = bytes;
    client::RegionOptions region;
    region.kind = client::RegionKind::kGpu;
    region.size_bytes = bytes;
    region.gpu = options.gpu;
    region.cuda_library = options.cuda_library;
    for (std::shared_ptr<client::Region>* memory : {&copy->from_, &copy->to_}) {
      auto made = client::Region::Create(region);
      if (!made.ok()) return made.status();
      *memory = *std::move(made);
    }
    return copy;
  }

  std::vector<double> Micros(uint32_t count) const {
    std::vector<double> micros;
    for (uint32_t i = 0; i < count; ++i) {
      const Clock::time_point start = Clock::now();
      const absl::Status status = device_->Copy(to_->data(), from_->data(), bytes_, nullptr);
      if (!status.ok()) Die("a copy on the GPU: " + std::string(status.message()));
      micros.push_back(MicrosSince(start));
    }
    return micros;
  }

 private:
  std::shared_ptr<CudaDevice> device_;
  std::shared_ptr<client::Region> from_;
  std::shared_ptr<client::Region> to_;
  uint64_t bytes_ = 0;
};

}  // namespace

class GpuRoutes::Server {
 public:
  explicit Server(const GpuOptions& options) : process_(Command(options)) {
    // "ready listen=..." or "listening on ..."
    if (!process_.WaitForLine("listen", std::chrono::seconds(60)).has_value()) {
      process_.Wait(std::chrono::seconds(1));
      why_not_ = absl::StrCat("no server on a GPU: ", LastLine(process_.error()));
    }
  }

  const std::string& why_not() const { return why_not_; }  // empty: it runs
  std::string address() const { return "unix:" + directory_.Path("server"); }
  pid_t pid() const { return process_.pid(); }

 private:
  std::vector<std::string> Command(const GpuOptions& options) const {
    std::vector<std::string> command = {"/usr/bin/env",
                                        "CUDA_VISIBLE_DEVICES=" + VisibleDevices(options.gpu)};
    for (absl::string_view part : absl::StrSplit(options.server, ' ', absl::SkipEmpty())) {
      command.emplace_back(part);
    }
    const std::vector<std::string> flags = {"--listen",        address(),
                                            "--region-socket", directory_.Path("regions"),
                                            "--nccl-library",  options.nccl_library,
                                            "--log-sessions",  "false"};
    command.insert(command.end(), flags.begin(), flags.end());
    return command;
  }

  testkit::TemporaryDirectory directory_;
  testkit::Process process_;
  std::string why_not_;
};

GpuRoutes::GpuRoutes(const GpuOptions& options, const RouteLoad* load)
    : options_(options), load_(load) {
  absl::Status status = CudaDevice::Open(options.cuda_library, options.gpu).status();
  if (status.ok()) {
    server_ = std::make_unique<Server>(options);
    if (!server_->why_not().empty()) status = absl::UnavailableError(server_->why_not());
  }
  for (const bool nccl : {false, true}) {
    GpuRoute& made = routes_.emplace_back();
    made.name = nccl ? kNccl : kCudaIpc;
    absl::Status why_not = status;
    if (status.ok()) {
      absl::StatusOr<std::unique_ptr<Route>> route = nccl ? MakeNccl() : MakeCudaIpc();
      why_not = route.ok() ? (*route)->Stream() : route.status();
      if (why_not.ok()) made.route = *std::move(route);
    }
    made.skipped = std::string(why_not.message());
  }
}

GpuRoutes::~GpuRoutes() = default;

std::unique_ptr<cli::Compressor> GpuRoutes::Compressor() const {
  return CompressorAt(server_->address(), "");
}

absl::StatusOr<RouteSetup> GpuRoutes::OnGpu(int gpu) const {
  client::RegionOptions options;
  options.kind = client::RegionKind::kGpu;
  options.size_bytes = load_->region_bytes();
  options.gpu = gpu;
  options.cuda_library = options_.cuda_library;
  auto region = client::Region::Create(options);
  if (!region.ok()) return region.status();
  RouteSetup setup;
  setup.server_pid = server_->pid();
  setup.arena = std::make_shared<client::Arena>(*region);
  // Queries travel in messages, from the host's memory.
  const auto host = std::make_shared<cli::SyntheticPrompt>(load_->open, load_->opened, 1);
  const auto device = std::make_shared<cli::SyntheticPrompt>(load_->open, load_->opened, 1);
  if (absl::Status moved = device->MoveTo(setup.arena.get()); !moved.ok()) return moved;
  setup.layer = [host, device](uint32_t layer) {
    client::LayerTensors tensors = host->Layer(layer);
    const client::LayerTensors on_gpu = device->Layer(layer);
    tensors.keys = on_gpu.keys;
    tensors.values = on_gpu.values;
    return tensors;
  };
  setup.floor_computes = false;
  return setup;
}

absl::StatusOr<std::unique_ptr<Route>> GpuRoutes::MakeCudaIpc() const {
  auto setup = OnGpu(options_.gpu);
  if (!setup.ok()) return setup.status();
  setup->transport = client::TransportChoice::kCudaIpc;
  auto copy = BareCopy::Make(options_, load_->key_value_bytes());
  if (!copy.ok()) return copy.status();
  const uint32_t layers = load_->open.geometry().layer_count();
  setup->floor = [copy = *copy, layers] { return copy->Micros(layers); };
  return std::make_unique<Route>(kCudaIpc, load_, Compressor(), *std::move(setup));
}

absl::StatusOr<std::unique_ptr<Route>> GpuRoutes::MakeNccl() const {
  auto nccl = client::NcclGpu::Open({.gpu = options_.nccl_gpu,
                                     .nccl_library = options_.nccl_library,
                                     .cuda_library = options_.cuda_library});
  if (!nccl.ok()) return nccl.status();
  auto setup = OnGpu(options_.nccl_gpu);
  if (!setup.ok()) return setup.status();
  setup->transport = client::TransportChoice::kNccl;
  setup->nccl = *std::move(nccl);
  BareNcclOptions bare;
  bare.cuda_library = options_.cuda_library;
  bare.nccl_library = options_.nccl_library;
  bare.near = options_.nccl_gpu;
  bare.far = options_.gpu;
  bare.there_bytes = load_->key_value_bytes();
  bare.back_bytes = load_->answer_bytes();
  bare.count = load_->open.geometry().layer_count();
  setup->floor = [bare] {
    const auto micros = BareNcclMicros(bare);
    if (!micros.ok()) Die("bare NCCL: " + std::string(micros.status().message()));
    return *micros;
  };
  return std::make_unique<Route>(kNccl, load_, Compressor(), *std::move(setup));
}

}  // namespace structkv::bench
