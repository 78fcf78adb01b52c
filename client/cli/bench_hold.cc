#include "client/cli/bench_hold.h"

#include <sys/resource.h>

#include <utility>

#include "absl/time/clock.h"
#include "client/cli/compressor.h"

namespace structkv::cli {

double OwnCpuSeconds() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void FetchFigures::Add(const FetchFigures& more) {
  seconds.insert(seconds.end(), more.seconds.begin(), more.seconds.end());
  release_seconds.insert(release_seconds.end(), more.release_seconds.begin(),
                         more.release_seconds.end());
  bytes += more.bytes;
  cpu_seconds += more.cpu_seconds;
  transport = more.transport;
  transport_reason = more.transport_reason;
}

absl::StatusOr<HeldFetcher> HeldFetcher::Connect(const BenchFlags& flags,
                                                 const SharedMemory& memory) {
  absl::StatusOr<std::unique_ptr<client::Client>> client =
      ConnectTo(flags.connection.server, flags.connection.security);
  if (!client.ok()) return client.status();
  client::FetchOptions options;
  options.metadata = TenantMetadata(flags.connection);
  options.checksums = flags.checksums;
  options.transport = flags.connection.transport;
  options.results = memory.arena;
  options.nccl = memory.nccl;
  options.on_layer = [](const client::LayerResult&) {};  // dropped as it comes
  return HeldFetcher(*std::move(client), std::move(options));
}

absl::Status HeldFetcher::Run(const v1::HeldCache& cache, FetchFigures* figures) {
  options_.replica = cache.replica();
  const double cpu = OwnCpuSeconds();
  const absl::Time start = absl::Now();
  const absl::StatusOr<client::FetchedCache> fetched =
      client_->FetchCache(cache.handle(), options_);
  if (!fetched.ok()) return fetched.status();
  const absl::Time end = absl::Now();
  figures->cpu_seconds += OwnCpuSeconds() - cpu;
  figures->seconds.push_back(absl::ToDoubleSeconds(end - start));
  figures->bytes += fetched->info.total_bytes();
  figures->transport = TransportText(fetched->info.transport());
  figures->transport_reason = fetched->info.transport_reason();
  client::HeldCallOptions call;
  call.metadata = options_.metadata;
  call.replica = cache.replica();
  absl::Status released = client_->ReleaseCache(cache.handle(), call);
  figures->release_seconds.push_back(absl::ToDoubleSeconds(absl::Now() - end));
  return released;
}

}  // namespace structkv::cli
