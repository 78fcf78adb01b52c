#include "tests/bench/wire_route.h"

#include <chrono>
#include <utility>
#include <variant>

#include "client/cli/bench_hold.h"
#include "structkv/sizes.h"
#include "tests/bench/server_process.h"
#include "tests/bench/wire_peer.h"
#include "tests/bench/wire_prompt.h"

namespace structkv::bench {

using Clock = std::chrono::steady_clock;

uint64_t RouteLoad::request_bytes() const {
  uint64_t bytes = 0;
  for (const int tensor : opened.required_tensors()) {
    bytes += client::InputTensorBytes(open, opened, static_cast<v1::Tensor>(tensor));
  }
  return bytes;
}

uint64_t RouteLoad::answer_bytes() const {
  return client::OutputTensorBytes(open, opened, 0, v1::TENSOR_KEYS) * 2;
}

uint64_t RouteLoad::key_value_bytes() const {
  return client::InputTensorBytes(open, opened, v1::TENSOR_KEYS) +
         client::InputTensorBytes(open, opened, v1::TENSOR_VALUES);
}

uint64_t RouteLoad::region_bytes() const {
  return cli::SyntheticPrompt::SizeOf(open, opened) + 2 * client::MostResultBytes(open);
}

v1::Open RouteOpen(const std::string& geometry, uint32_t tokens) {
  const auto model = cli::ModelByName(geometry);
  if (!model.ok()) Die(std::string(model.status().message()));
  v1::Open open;
  *open.mutable_geometry() = model->geometry;
  open.set_prompt_tokens(tokens);
  open.set_dtype(v1::DTYPE_BF16);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.set_statistic(v1::STATISTIC_WINDOW_QUERIES);
  open.set_output(v1::OUTPUT_COMPACT);
  open.mutable_method()->mutable_structkv();
  return open;
}

std::unique_ptr<cli::Compressor> CompressorAt(const std::string& server,
                                              const std::string& backend) {
  cli::ConnectionFlags flags;
  flags.server = server;
  flags.in_process = server.empty();
  flags.backend = backend;
  auto made = cli::MakeCompressor(flags);
  if (!made.ok()) Die(std::string(made.status().message()));
  return *std::move(made);
}

Route::Route(std::string name, const RouteLoad* load, std::unique_ptr<cli::Compressor> compressor,
             RouteSetup setup)
    : name_(std::move(name)),
      load_(load),
      compressor_(std::move(compressor)),
      setup_(std::move(setup)) {}

client::SessionOptions Route::Options() const {
  client::SessionOptions options;
  options.transport = setup_.transport;
  if (setup_.arena != nullptr) {
    options.regions = {setup_.arena->region()};
    options.results = setup_.arena;
  }
  options.nccl = setup_.nccl;
  return options;
}

double Route::CpuSeconds() const {
  const auto pid = static_cast<pid_t>(setup_.server_pid);
  return cli::OwnCpuSeconds() + (pid > 0 ? ProcessCpuSeconds(pid) : 0);
}

absl::Status Route::Step() {
  std::vector<Clock::time_point> sent(load_->open.geometry().layer_count());
  client::SessionOptions options = Options();
  options.on_event = [&](const client::Event& event) {
    const auto* result = std::get_if<client::LayerResult>(&event);
    if (result != nullptr) micros_.push_back(MicrosSince(sent[result->layer]));
  };
  const auto source = [&](uint32_t number, const client::PivotResult*) {
    sent[number] = Clock::now();
    return absl::StatusOr<client::LayerTensors>(setup_.layer(number));
  };
  const auto summary = compressor_->RunInSteps(load_->open, source, options);
  if (!summary.ok()) return summary.status();
  transport_name_ = summary->transport();
  compute_micros_ += static_cast<double>(summary->timing().compute_micros());
  layers_ = micros_.size();
  return absl::OkStatus();
}

absl::Status Route::Stream() {
  client::SessionOptions options = Options();
  options.on_event = [](const client::Event&) {};
  const auto source = [&](uint32_t number) {
    return absl::StatusOr<client::LayerTensors>(setup_.layer(number));
  };
  const CopyMeter meter(&copies_);
  const double cpu = CpuSeconds();
  const Clock::time_point start = Clock::now();
  const auto summary = compressor_->Run(load_->open, source, options);
  if (!summary.ok()) return summary.status();
  seconds_ += 1e-6 * MicrosSince(start);
  cpu_seconds_ += CpuSeconds() - cpu;
  bytes_ += summary->input_bytes() + summary->output_bytes();
  return absl::OkStatus();
}

void Route::RunFloor() {
  if (setup_.floor == nullptr) return;
  const std::vector<double> micros = setup_.floor();
  floor_micros_.insert(floor_micros_.end(), micros.begin(), micros.end());
}

void Route::Clear() {
  micros_.clear();
  floor_micros_.clear();
  layers_ = bytes_ = 0;
  compute_micros_ = seconds_ = cpu_seconds_ = 0;
  copies_.reset();
}

}  // namespace structkv::bench
