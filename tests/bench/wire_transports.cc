#include "tests/bench/wire_transports.h"

#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <sstream>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "client/cli/bench_hold.h"
#include "client/cli/compressor.h"
#include "client/cli/synthetic.h"
#include "structkv/arena.h"
#include "structkv/sizes.h"
#include "tests/bench/server_process.h"
#include "tests/bench/wire_bare.h"
#include "tests/bench/wire_peer.h"
#include "tests/bench/wire_prompt.h"
#include "tests/bench/wire_round_trip.h"

namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kLayers = 32;
constexpr uint64_t kMessageBytes = uint64_t{2} << 20;  // as the client library sends

v1::Open OpenOf(uint32_t tokens) {
  v1::Open open;
  *open.mutable_geometry() = cli::ModelByName("llama-3.1-8b")->geometry;
  open.set_prompt_tokens(tokens);
  open.set_dtype(v1::DTYPE_BF16);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.set_statistic(v1::STATISTIC_WINDOW_QUERIES);
  open.set_output(v1::OUTPUT_COMPACT);
  open.mutable_method()->mutable_structkv();
  return open;
}

// Bytes that this network namespace has sent over its loopback device.
uint64_t LoopbackBytes() {
  std::ifstream file("/proc/net/dev");
  for (std::string line; std::getline(file, line);) {
    const size_t name = line.find("lo:");
    if (name == std::string::npos) continue;
    std::istringstream fields(line.substr(name + 3));
    uint64_t received = 0;
    fields >> received;
    return received;
  }
  return 0;
}

// One way for a layer to travel, and what it took.
struct Way {
  std::string name;
  std::unique_ptr<cli::Compressor> compressor;
  client::TransportChoice transport = client::TransportChoice::kInline;
  int64_t server_pid = 0;  // 0: none
  std::string transport_name;
  std::vector<double> micros;
  double compute_micros = 0;  // of the layers in `micros`, as the service has it
  double seconds = 0;
  double cpu_seconds = 0;
  uint64_t bytes = 0;  // of tensors, both ways

  double CpuSeconds() const {
    return cli::OwnCpuSeconds() + (server_pid > 0 ? ProcessCpuSeconds(server_pid) : 0);
  }
};

std::unique_ptr<cli::Compressor> CompressorAt(const std::string& server) {
  cli::ConnectionFlags flags;
  flags.server = server;
  flags.in_process = server.empty();
  auto made = cli::MakeCompressor(flags);
  if (!made.ok()) Die(std::string(made.status().message()));
  return *std::move(made);
}

class Bench {
 public:
  explicit Bench(uint32_t tokens) : open_(OpenOf(tokens)) {}

  // Makes the tensors, once `way` has said what is asked for, in memory that a server can share.
  void Prepare(Way& way) {
    v1::Opened opened;
    client::SessionOptions options;
    options.on_opened = [&](const v1::Opened& answer) { opened = answer; };
    options.on_event = [](const client::Event&) {};
    const auto none = [](uint32_t) -> absl::StatusOr<client::LayerTensors> {
      return absl::CancelledError("asked");
    };
    way.compressor->Run(open_, none, options).IgnoreError();
    request_bytes_ = 0;
    for (const int tensor : opened.required_tensors()) {
      request_bytes_ += client::InputTensorBytes(open_, opened, static_cast<v1::Tensor>(tensor));
    }
    answer_bytes_ = client::OutputTensorBytes(open_, opened, 0, v1::TENSOR_KEYS) * 2;
    client::RegionOptions region;
    region.size_bytes =
        cli::SyntheticPrompt::SizeOf(open_, opened) + 2 * client::MostResultBytes(open_);
    const auto made = client::Region::Create(region);
    if (!made.ok()) Die(std::string(made.status().message()));
    arena_ = std::make_shared<client::Arena>(*made);
    tensors_ = std::make_unique<cli::SyntheticPrompt>(
        open_, opened, 1, [this](size_t size) { return arena_->Allocate(size).value(); });
  }

  // One layer after the other.
  void Step(Way& way) {
    std::vector<Clock::time_point> sent(kLayers);
    client::SessionOptions options = OptionsOf(way);
    options.on_event = [&](const client::Event& event) {
      const auto* layer = std::get_if<client::LayerResult>(&event);
      if (layer != nullptr) way.micros.push_back(MicrosSince(sent[layer->layer]));
    };
    const auto source = [&](uint32_t layer, const client::PivotResult*) {
      sent[layer] = Clock::now();
      return absl::StatusOr<client::LayerTensors>(tensors_->Layer(layer));
    };
    const auto summary = way.compressor->RunInSteps(open_, source, options);
    if (!summary.ok()) Die(way.name + ": " + std::string(summary.status().message()));
    way.transport_name = summary->transport();
    way.compute_micros += static_cast<double>(summary->timing().compute_micros());
  }

  // All layers at once.
  void Stream(Way& way) {
    client::SessionOptions options = OptionsOf(way);
    options.on_event = [](const client::Event&) {};
    const auto source = [&](uint32_t layer) {
      return absl::StatusOr<client::LayerTensors>(tensors_->Layer(layer));
    };
    const double cpu = way.CpuSeconds();
    const Clock::time_point start = Clock::now();
    const auto summary = way.compressor->Run(open_, source, options);
    if (!summary.ok()) Die(way.name + ": " + std::string(summary.status().message()));
    way.seconds += 1e-6 * MicrosSince(start);
    way.cpu_seconds += way.CpuSeconds() - cpu;
    way.bytes += summary->input_bytes() + summary->output_bytes();
  }

  // Bytes that cross the loopback device for each byte of tensors.
  double SocketShare(const std::string& address, client::TransportChoice transport) {
    Way way{.name = "socket bytes", .compressor = CompressorAt(address), .transport = transport};
    Stream(way);  // connects, registers
    way.bytes = 0;
    const uint64_t before = LoopbackBytes();
    Stream(way);
    return static_cast<double>(LoopbackBytes() - before) / static_cast<double>(way.bytes);
  }

  // Layers' bytes over the bare service, in messages of the same size that are answered in equal
  // parts.
  // The channel is one that lasts, as those of the others.
  std::vector<double> BareLayers(const std::shared_ptr<grpc::Channel>& channel) const {
    grpc::ClientContext context;
    const uint64_t messages = (request_bytes_ + kMessageBytes - 1) / kMessageBytes;
    context.AddMetadata(kAnswerBytesKey, std::to_string(answer_bytes_ / messages));
    const auto stream = bench::StartStream(channel, kAnswerMethod, &context);
    const std::string data(request_bytes_ / messages, 'b');
    std::vector<double> micros;
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const Clock::time_point start = Clock::now();
      std::thread sender([&] {
        const grpc::Slice slice(data.data(), data.size(), grpc::Slice::STATIC_SLICE);
        for (uint64_t i = 0; i < messages; ++i) stream->Write(grpc::ByteBuffer(&slice, 1));
      });
      grpc::ByteBuffer answer;
      for (uint64_t i = 0; i < messages; ++i) {
        if (!stream->Read(&answer)) Die("the bare service ended");
      }
      sender.join();
      micros.push_back(MicrosSince(start));
    }
    stream->WritesDone();
    FinishOrDie(stream.get(), "bare service");
    return micros;
  }

 private:
  client::SessionOptions OptionsOf(const Way& way) const {
    client::SessionOptions options;
    options.transport = way.transport;
    if (way.transport == client::TransportChoice::kSharedMemory) {
      options.regions = {arena_->region()};
      options.results = arena_;
    }
    return options;
  }

  const v1::Open open_;
  uint64_t request_bytes_ = 0;  // of a layer
  uint64_t answer_bytes_ = 0;
  std::shared_ptr<client::Arena> arena_;
  std::unique_ptr<cli::SyntheticPrompt> tensors_;
};

}  // namespace

nlohmann::json MeasureTransports(const TransportAddresses& addresses, uint32_t tokens,
                                 int prompts) {
  using client::TransportChoice;
  Bench bench(tokens);
  std::vector<Way> ways(4);
  ways[0].name = "in process";
  ways[0].compressor = CompressorAt("");
  ways[1].name = "inline, TCP";
  ways[1].compressor = CompressorAt(addresses.tcp);
  ways[2].name = "inline, unix socket";
  ways[2].compressor = CompressorAt(addresses.unix_socket);
  ways[3].name = "shared memory";
  ways[3].compressor = CompressorAt(addresses.unix_socket);
  ways[3].transport = TransportChoice::kSharedMemory;
  for (size_t i = 1; i < ways.size(); ++i) ways[i].server_pid = addresses.server_pid;
  bench.Prepare(ways[0]);
  std::vector<double> bare[2];
  const std::shared_ptr<grpc::Channel> channels[] = {Connect(addresses.bare_tcp),
                                                     Connect(addresses.bare_unix)};
  for (int round = 0; round <= prompts; ++round) {
    for (Way& way : ways) {
      bench.Step(way);
      bench.Stream(way);
      if (round > 0) continue;  // it warmed everything up
      way.micros.clear();
      way.compute_micros = way.seconds = way.cpu_seconds = 0;
      way.bytes = 0;
    }
    for (const int i : {0, 1}) {
      const auto micros = bench.BareLayers(channels[i]);
      if (round > 0) bare[i].insert(bare[i].end(), micros.begin(), micros.end());
    }
  }
  const double shares[] = {0, bench.SocketShare(addresses.tcp, TransportChoice::kInline), 0,
                           bench.SocketShare(addresses.tcp, TransportChoice::kSharedMemory)};
  const double arithmetic = Summarise(ways[0].micros).p50_micros;
  nlohmann::json rows;
  for (size_t i = 0; i < ways.size(); ++i) {
    const Way& way = ways[i];
    const RoundTrip trip = Summarise(way.micros);
    const bool messages = i == 1 || i == 2;
    const double floor = arithmetic + (messages ? Summarise(bare[i - 1]).p50_micros : 0);
    const double gigabytes = static_cast<double>(way.bytes) / 1e9;
    rows.push_back(
        {{"way", way.name},
         {"transport", way.transport_name},
         {"tokens", tokens},
         {"p50_micros", trip.p50_micros},
         {"p99_micros", trip.p99_micros},
         {"floor_p50_micros", floor},
         {"added_p50_micros", trip.p50_micros - floor},
         {"compute_mean_micros", way.compute_micros / static_cast<double>(way.micros.size())},
         {"gb_per_s", gigabytes / way.seconds},
         {"cpu_seconds_per_gb", way.cpu_seconds / gigabytes}});
    if (shares[i] > 0) rows.back()["socket_bytes_per_byte"] = shares[i];
  }
  return rows;
}

void PrintTransports(const nlohmann::json& rows) {
  std::printf("%-20s %10s %10s %10s %10s %10s %7s %9s %11s\n", "a layer, us", "p50", "p99",
              "floor p50", "added", "computing", "GB/s", "CPU s/GB", "socket B/B");
  for (const nlohmann::json& row : rows) {
    const bool counted = row.contains("socket_bytes_per_byte");
    std::printf("%-20s %10.0f %10.0f %10.0f %10.0f %10.0f %7.2f %9.3f %11s\n",
                row["way"].get<std::string>().c_str(), row["p50_micros"].get<double>(),
                row["p99_micros"].get<double>(), row["floor_p50_micros"].get<double>(),
                row["added_p50_micros"].get<double>(), row["compute_mean_micros"].get<double>(),
                row["gb_per_s"].get<double>(), row["cpu_seconds_per_gb"].get<double>(),
                counted ? std::to_string(row["socket_bytes_per_byte"].get<double>()).c_str() : "-");
  }
  std::printf("shared memory: at most %.0f us added\n", kSharedMemoryBarMicros);
}

bool TransportsPass(const nlohmann::json& rows) {
  return rows.back()["added_p50_micros"].get<double>() <= kSharedMemoryBarMicros;
}

}  // namespace structkv::bench
