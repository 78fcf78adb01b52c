#include "tests/bench/wire_transports.h"

#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "grpcpp/support/byte_buffer.h"
#include "tests/bench/wire_bare.h"
#include "tests/bench/wire_copies.h"
#include "tests/bench/wire_peer.h"
#include "tests/bench/wire_prompt.h"
#include "tests/bench/wire_round_trip.h"

namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kMessageBytes = uint64_t{2} << 20;  // as the client library sends
constexpr char kSharedMemory[] = "shared memory";

// What the service says of such prompts.
v1::Opened Ask(cli::Compressor& compressor, const v1::Open& open) {
  v1::Opened opened;
  client::SessionOptions options;
  options.on_opened = [&](const v1::Opened& answer) { opened = answer; };
  options.on_event = [](const client::Event&) {};
  const auto none = [](uint32_t) -> absl::StatusOr<client::LayerTensors> {
    return absl::CancelledError("asked");
  };
  compressor.Run(open, none, options).IgnoreError();
  if (opened.required_tensors().empty()) Die("the prompt is not opened");
  return opened;
}

// Layers' bytes over the bare service, in messages of the same size that are answered in equal
// parts.
std::vector<double> BareLayers(const std::shared_ptr<grpc::Channel>& channel,
                               const RouteLoad& load) {
  grpc::ClientContext context;
  const uint64_t messages = (load.request_bytes() + kMessageBytes - 1) / kMessageBytes;
  context.AddMetadata(kAnswerBytesKey, std::to_string(load.answer_bytes() / messages));
  const auto stream = bench::StartStream(channel, kAnswerMethod, &context);
  const std::string data(load.request_bytes() / messages, 'b');
  std::vector<double> micros;
  for (uint32_t layer = 0; layer < load.open.geometry().layer_count(); ++layer) {
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

// Those that need no GPU; the first is the arithmetic alone.
std::vector<std::unique_ptr<Route>> HostRoutes(const TransportAddresses& addresses,
                                               const TransportOptions& options,
                                               const RouteLoad& load) {
  client::RegionOptions region;
  region.size_bytes = load.region_bytes();
  const auto made = client::Region::Create(region);
  if (!made.ok()) Die(std::string(made.status().message()));
  const auto arena = std::make_shared<client::Arena>(*made);
  const auto tensors = std::make_shared<cli::SyntheticPrompt>(
      load.open, load.opened, 1, [&](size_t size) { return arena->Allocate(size).value(); });
  RouteSetup setup;
  setup.layer = [tensors](uint32_t layer) { return tensors->Layer(layer); };
  std::vector<std::unique_ptr<Route>> routes;
  const auto add = [&](const char* name, const std::string& server) {
    routes.push_back(
        std::make_unique<Route>(name, &load, CompressorAt(server, options.backend), setup));
  };
  add("in process", "");
  setup.server_pid = addresses.server_pid;
  // Right after its floor, before the others have filled the caches with copies.
  RouteSetup inline_setup = setup;
  setup.transport = client::TransportChoice::kSharedMemory;
  setup.arena = arena;
  add(kSharedMemory, addresses.unix_socket);
  setup = std::move(inline_setup);
  for (const auto& [name, server, bare] :
       {std::tuple("inline, TCP", addresses.tcp, addresses.bare_tcp),
        std::tuple("inline, unix socket", addresses.unix_socket, addresses.bare_unix)}) {
    // A channel that lasts, as the others'.
    setup.floor = [channel = Connect(bare), &load] { return BareLayers(channel, load); };
    add(name, server);
  }
  return routes;
}

void Check(const Route& route, const absl::Status& status) {
  if (!status.ok()) Die(route.name() + ": " + std::string(status.message()));
}

nlohmann::json RowOf(const Route& route, double arithmetic) {
  const RoundTrip trip = Summarise(route.micros());
  double floor = route.floor_computes() ? arithmetic : 0;
  if (!route.floor_micros().empty()) floor += Summarise(route.floor_micros()).p50_micros;
  nlohmann::json row = {{"way", route.name()},
                        {"transport", route.transport_name()},
                        {"p50_micros", trip.p50_micros},
                        {"p99_micros", trip.p99_micros},
                        {"floor_p50_micros", floor},
                        {"added_p50_micros", trip.p50_micros - floor},
                        {"compute_mean_micros", route.compute_mean_micros()},
                        {"gb_per_s", route.gigabytes() / route.seconds()},
                        {"cpu_seconds_per_gb", route.cpu_seconds() / route.gigabytes()}};
  if (route.copies().has_value()) AddCopies(*route.copies(), 1e9 * route.gigabytes(), &row);
  return row;
}

}  // namespace

nlohmann::json MeasureTransports(const TransportAddresses& addresses,
                                 const TransportOptions& options) {
  RouteLoad load;
  load.open = RouteOpen(options.geometry, options.tokens);
  load.opened = Ask(*CompressorAt("", options.backend), load.open);
  std::vector<std::unique_ptr<Route>> host = HostRoutes(addresses, options, load);
  GpuRoutes gpu(options.gpu, &load);
  std::vector<Route*> routes;
  for (const auto& route : host) routes.push_back(route.get());
  for (const GpuRoute& made : gpu.routes()) {
    if (made.route != nullptr) routes.push_back(made.route.get());
  }
  for (int round = 0; round <= options.prompts; ++round) {
    for (Route* route : routes) {
      Check(*route, route->Step());
      Check(*route, route->Stream());
      route->RunFloor();
      if (round == 0) route->Clear();  // it warmed everything up
    }
  }
  const double arithmetic = Summarise(host[0]->micros()).p50_micros;
  nlohmann::json rows;
  for (const Route* route : routes) rows.push_back(RowOf(*route, arithmetic));
  for (const GpuRoute& made : gpu.routes()) {
    if (made.route == nullptr) rows.push_back({{"way", made.name}, {"skipped", made.skipped}});
  }
  for (nlohmann::json& row : rows) row["tokens"] = options.tokens;
  return rows;
}

void PrintTransports(const nlohmann::json& rows) {
  std::printf("%-20s %10s %10s %10s %10s %10s %7s %9s %10s %10s\n", "a layer, us", "p50", "p99",
              "floor p50", "added", "computing", "GB/s", "CPU s/GB", "CPU copies", "socket B/B");
  for (const nlohmann::json& row : rows) {
    const std::string name = row["way"];
    if (row.contains("skipped")) {
      std::printf("%-20s skipped: %s\n", name.c_str(), row["skipped"].get<std::string>().c_str());
      continue;
    }
    std::printf("%-20s %10.0f %10.0f %10.0f %10.0f %10.0f %7.2f %9.3f %10s %10s\n", name.c_str(),
                row["p50_micros"].get<double>(), row["p99_micros"].get<double>(),
                row["floor_p50_micros"].get<double>(), row["added_p50_micros"].get<double>(),
                row["compute_mean_micros"].get<double>(), row["gb_per_s"].get<double>(),
                row["cpu_seconds_per_gb"].get<double>(), CopiesText(row, kCopiesKey).c_str(),
                CopiesText(row, kSocketKey).c_str());
  }
  std::printf("shared memory: at most %.0f us added\n", kSharedMemoryBarMicros);
}

bool TransportsPass(const nlohmann::json& rows) {
  for (const nlohmann::json& row : rows) {
    if (row["way"] == kSharedMemory) {
      return row["added_p50_micros"].get<double>() <= kSharedMemoryBarMicros;
    }
  }
  return false;
}

}  // namespace structkv::bench
