// Compacted caches that stay in the service: fetched, renewed and released by their handles.
//
//   open.set_output(v1::OUTPUT_HOLD);            // the prefill worker
//   ... summary.held().handle() ...
//
//   FetchOptions options;                        // a decode worker, rank 1 of 4
//   options.first_kv_head = 2;
//   options.kv_head_count = 2;
//   auto fetched = client->FetchCache(handle, options);
//   client->ReleaseCache(handle);
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "structkv/options.h"
#include "structkv/result.h"
#include "structkv/v1/held_cache.pb.h"

namespace structkv::client {

class Arena;  // arena.h
class Client;
class NcclGpu;  // nccl.h

// Of each call of the service.
struct HeldCallOptions {
  // From the first attempt to the end.
  absl::Duration timeout = absl::Seconds(10);
  // Of several replicas: the address of the one that holds the cache (`HeldCache.replica`). Empty:
  // each is asked in turn.
  std::string replica;
  // Sent as gRPC metadata with every attempt.
  std::vector<std::pair<std::string, std::string>> metadata;
  // Of a fetch.
  CallLabels labels;
};

struct FetchOptions : HeldCallOptions {
  FetchOptions() { timeout = absl::InfiniteDuration(); }

  // As in FetchCacheRequest; counts of 0: all from the first on.
  uint32_t first_layer = 0;
  uint32_t layer_count = 0;
  uint32_t first_kv_head = 0;
  uint32_t kv_head_count = 0;
  // Bytes of a message, at most: 64 KiB to the server's limit, otherwise INVALID_ARGUMENT.
  uint32_t max_message_bytes = 0;  // 0: the server's default
  // Have the server send an XXH3 checksum with every piece.
  bool checksums = false;
  // A fetch that breaks (UNAVAILABLE), or finds no room and is told when to come again, goes on
  // where it was. `max_attempts` are those without a byte in between.
  RetryPolicy retry;
  // Where tensors go; null: memory from the client's pool.
  ResultAllocator allocate;
  // Keys and values of all layers lie here, in one block that LayerResult.keys and .values share,
  // and over shared memory the server writes them there. FetchResultBytes() of it are needed,
  // otherwise the fetch is RESOURCE_EXHAUSTED. A GPU's arena is written over CUDA IPC or received
  // by NCCL, and a fetch without either is FAILED_PRECONDITION. Null, or where the host's arena
  // cannot be offered when the fetch begins: they come in messages and lie elsewhere, to the end of
  // the fetch.
  std::shared_ptr<Arena> results;
  // As StreamOptions.transport: with `results`, and where the server has shared memory on this
  // host, that is taken. CacheInfo.transport and .transport_reason say which it was and why.
  TransportChoice transport = TransportChoice::kAuto;
  // For NCCL: the GPU that `results` is of, which is attached to the server where it is not. A
  // fetch that breaks goes on with the first layer that is not there.
  std::shared_ptr<NcclGpu> nccl;
  // The most tensor bytes that are taken in; a cache that has more is refused as
  // RESOURCE_EXHAUSTED before memory is taken for it, whatever the server says. The default is
  // above a whole cache of 131,072 tokens of models with 8 KV heads of 128 in 80 layers.
  uint64_t max_bytes = uint64_t{64} << 30;
  // Called by the calling thread with the first `info`.
  std::function<void(const v1::CacheInfo&)> on_info;
  // Takes the layers as they are complete, in place of FetchedCache.layers. Called by the calling
  // thread.
  std::function<void(LayerResult)> on_layer;
};

// What was asked for of a held cache.
struct FetchedCache {
  v1::CacheInfo info;
  // In layer order, with the heads that were asked for; without saliency.
  std::vector<LayerResult> layers;
  // Attempts that it took.
  int attempts = 0;
};

// Keeps a held cache alive: renews its lease three times in each, until it is destroyed.
// Thread-safe.
class CacheLease {
 public:
  // `client` outlives it. `lease`: as the summary, or a renewal, said.
  CacheLease(Client* client, std::string handle, absl::Duration lease,
             const HeldCallOptions& options = {});
  // Stops renewing, and leaves the cache to its lease.
  ~CacheLease();
  CacheLease(const CacheLease&) = delete;
  CacheLease& operator=(const CacheLease&) = delete;

  // How the last renewal ended; OK before the first. After NOT_FOUND there are no more.
  absl::Status status() const;
  // Renewals that succeeded.
  int64_t renewals() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// The `Open` and `Opened` of a prompt that has the fetched heads alone, as far as the sizes of its
// answers follow from them (sizes.h). `layers` of the model are all there; those that were not
// fetched keep 0 tokens.
v1::Open OpenOf(const v1::CacheInfo& info);
v1::Opened OpenedOf(const v1::CacheInfo& info);

// Bytes that what `info` describes takes of FetchOptions.results.
uint64_t FetchResultBytes(const v1::CacheInfo& info);

}  // namespace structkv::client
