// The second half of `structkv bench --hold`: what was held is fetched, and released.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/cli/bench_flags.h"
#include "client/cli/shared_memory.h"
#include "structkv/client.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// What fetches have measured.
struct FetchFigures {
  std::vector<double> seconds;  // of each fetch, its description included
  std::vector<double> release_seconds;
  uint64_t bytes = 0;
  double cpu_seconds = 0;        // of this process while it fetched
  std::string transport;         // of the last one
  std::string transport_reason;  // likewise: why not a better one

  void Add(const FetchFigures& more);
};

// User and system time of this process so far.
double OwnCpuSeconds();

// One connection. Not thread-safe.
class HeldFetcher {
 public:
  // `memory`: where rows go that do not come in messages.
  static absl::StatusOr<HeldFetcher> Connect(const BenchFlags& flags, const SharedMemory& memory);

  // Fetches all of a cache and frees it.
  absl::Status Run(const v1::HeldCache& cache, FetchFigures* figures);

 private:
  HeldFetcher(std::unique_ptr<client::Client> client, client::FetchOptions options)
      : client_(std::move(client)), options_(std::move(options)) {}

  std::unique_ptr<client::Client> client_;
  client::FetchOptions options_;
};

}  // namespace structkv::cli
