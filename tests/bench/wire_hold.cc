#include "tests/bench/wire_hold.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "client/cli/bench_hold.h"
#include "structkv/arena.h"
#include "structkv/client.h"
#include "tests/bench/copy_count.h"
#include "tests/bench/server_process.h"
#include "tests/bench/wire_copies.h"
#include "tests/bench/wire_peer.h"
#include "tests/bench/wire_round_trip.h"

namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// A way for the bytes to go, beside its floor.
class Way {
 public:
  explicit Way(int64_t server_pid) : server_pid_(static_cast<pid_t>(server_pid)) {}

  // Seconds that `own` takes, with the CPU time and the copies of both processes.
  template <class Own>
  void Run(double floor_seconds, Own own) {
    const CopyMeter meter(&copies_);
    const double cpu = Cpu();
    const double seconds = own();
    cpu_seconds_.push_back(Cpu() - cpu);
    seconds_.push_back(seconds);
    floors_.push_back(floor_seconds);
  }
  // The round so far was to warm up.
  void Clear() {
    seconds_.clear();
    floors_.clear();
    cpu_seconds_.clear();
    copies_.reset();
  }
  nlohmann::json Report(double bytes) const {
    std::vector<double> ratios;
    for (size_t i = 0; i < seconds_.size(); ++i) ratios.push_back(floors_[i] / seconds_[i]);
    std::vector<double> micros;
    for (const double seconds : seconds_) micros.push_back(seconds * 1e6);
    const RoundTrip times = Summarise(std::move(micros));
    nlohmann::json row = {
        {"floor_gb_per_s", bytes / *std::min_element(floors_.begin(), floors_.end()) / 1e9},
        {"gb_per_s", bytes / *std::min_element(seconds_.begin(), seconds_.end()) / 1e9},
        {"median_ratio_of_pairs", Median(ratios)},
        {"p50_seconds", times.p50_micros * 1e-6},
        {"p99_seconds", times.p99_micros * 1e-6},
        {"cpu_seconds_per_gb", Median(cpu_seconds_) * 1e9 / bytes}};
    if (copies_.has_value()) {
      AddCopies(*copies_, bytes * static_cast<double>(seconds_.size()), &row);
    }
    return row;
  }

 private:
  double Cpu() const { return cli::OwnCpuSeconds() + ProcessCpuSeconds(server_pid_); }

  const pid_t server_pid_;
  std::vector<double> seconds_;
  std::vector<double> floors_;
  std::vector<double> cpu_seconds_;
  std::optional<Copies> copies_;
};

// Fetches into a region by the client library.
class SharedFetch {
 public:
  SharedFetch(const std::string& address, uint64_t bytes) : source_(bytes, std::byte{1}) {
    auto client = client::Client::Connect(address);
    const auto region = client::Region::Create({.size_bytes = bytes + (size_t{1} << 20)});
    if (!client.ok()) Die(std::string(client.status().message()));
    if (!region.ok()) Die(std::string(region.status().message()));
    client_ = *std::move(client);
    arena_ = std::make_shared<client::Arena>(*region);
  }

  double Seconds(const std::string& handle) {
    client::FetchOptions options;
    options.results = arena_;
    options.transport = client::TransportChoice::kSharedMemory;
    options.on_layer = [](const client::LayerResult&) {};
    const Clock::time_point start = Clock::now();
    const auto fetched = client_->FetchCache(handle, options);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (!fetched.ok()) Die(std::string(fetched.status().message()));
    if (!client_->ReleaseCache(handle).ok()) Die("ReleaseCache failed");
    return seconds;
  }
  double CopySeconds() {
    const Clock::time_point start = Clock::now();
    std::memcpy(arena_->region()->data(), source_.data(), source_.size());
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

 private:
  std::vector<std::byte> source_;
  std::unique_ptr<client::Client> client_;
  std::shared_ptr<client::Arena> arena_;
};

constexpr const char* kWays[] = {"send", "hold", "fetch", "fetch_shared"};

}  // namespace

nlohmann::json MeasureHold(const HoldAddresses& addresses, const StreamOptions& options,
                           int repeats) {
  std::vector<Way> ways(std::size(kWays), Way(addresses.server_pid));
  Way& send = ways[0];
  Way& hold = ways[1];
  Way& fetch = ways[2];
  Way& shared = ways[3];
  SharedFetch shared_fetch(addresses.held, options.total_bytes);
  for (int i = 0; i <= repeats; ++i) {
    std::string handle;
    const double up = BareUploadSeconds(addresses.bare, options);
    send.Run(up, [&] { return SendSeconds(addresses.held, options); });
    hold.Run(up, [&] { return HoldSeconds(addresses.held, options, &handle); });
    const double down = BareDownloadSeconds(addresses.bare, options);
    fetch.Run(down, [&] { return FetchSeconds(addresses.held, options, handle); });
    HoldSeconds(addresses.held, options, &handle);
    const double copy = shared_fetch.CopySeconds();
    shared.Run(copy, [&] { return shared_fetch.Seconds(handle); });
    if (i > 0) continue;
    for (Way& way : ways) way.Clear();
  }
  nlohmann::json result = {{"bytes", options.total_bytes}, {"chunk_bytes", options.chunk_bytes}};
  for (size_t i = 0; i < ways.size(); ++i) {
    result[kWays[i]] = ways[i].Report(static_cast<double>(options.total_bytes));
  }
  return result;
}

void PrintHold(const std::string& socket, const nlohmann::json& result) {
  for (const char* way : kWays) {
    const nlohmann::json& row = result[way];
    std::printf(
        "%-5s %-12s %6.2f GB/s, floor %6.2f GB/s, median ratio of pairs %.3f; p50 %.1f ms, p99 "
        "%.1f ms; CPU %.3f s/GB; copies %s B/B\n",
        socket.c_str(), way, row["gb_per_s"].get<double>(), row["floor_gb_per_s"].get<double>(),
        row["median_ratio_of_pairs"].get<double>(), 1e3 * row["p50_seconds"].get<double>(),
        1e3 * row["p99_seconds"].get<double>(), row["cpu_seconds_per_gb"].get<double>(),
        CopiesText(row, kCopiesKey).c_str());
  }
}

bool HoldPasses(const nlohmann::json& result, double share) {
  return result["hold"]["median_ratio_of_pairs"].get<double>() >= share &&
         result["fetch"]["median_ratio_of_pairs"].get<double>() >= share;
}

}  // namespace structkv::bench
