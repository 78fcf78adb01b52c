#include "service/engine/shard_saliency.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/status/status.h"

namespace structkv::engine {
namespace {

// The shards that hold the KV heads of `shards[first]`, which is the first of them, by query head.
std::vector<size_t> Sharers(absl::Span<const Shard> shards, size_t first) {
  std::vector<size_t> sharers;
  for (size_t i = first; i < shards.size(); ++i) {
    if (shards[i].kv_heads == shards[first].kv_heads) sharers.push_back(i);
  }
  std::sort(sharers.begin(), sharers.end(), [&](size_t a, size_t b) {
    return shards[a].query_heads.begin < shards[b].query_heads.begin;
  });
  return sharers;
}

bool IsFirstOfItsHeads(absl::Span<const Shard> shards, size_t index) {
  for (size_t i = 0; i < index; ++i) {
    if (shards[i].kv_heads == shards[index].kv_heads) return false;
  }
  return true;
}

// The buffers one after the other.
Buffer Join(absl::Span<LayerInput> parts, const std::vector<size_t>& sharers,
            Buffer LayerInput::*tensor, BufferPool& pool) {
  size_t size = 0;
  for (const size_t i : sharers) size += (parts[i].*tensor).size();
  if (size == 0) return {};
  Buffer joined = pool.Acquire(size);
  std::byte* to = joined.data();
  for (const size_t i : sharers) {
    const Buffer& part = parts[i].*tensor;
    std::memcpy(to, part.data(), part.size());
    to += part.size();
  }
  return joined;
}

// Scores the KV heads of one shard, or the one that it shares with others, into `out`, [its KV
// heads, tokens].
absl::Status ScoreHeads(const PromptSpec& spec, const Backend& backend, BufferPool& pool,
                        absl::Span<const Shard> shards, absl::Span<LayerInput> parts, size_t first,
                        float* out, ParallelFor parallel) {
  const HeadRange& heads = shards[first].kv_heads;
  const std::vector<size_t> sharers = Sharers(shards, first);
  const int64_t group = spec.geometry.group();
  const PromptSpec own = ShardSpec(
      spec, {.kv_heads = heads, .query_heads = {heads.begin * group, heads.count * group}});
  LayerInput& input = parts[first];
  if (sharers.size() == 1) {
    return ComputePerHead(own, backend, pool, input, heads.begin, out, parallel);
  }
  Buffer queries = Join(parts, sharers, &LayerInput::window_queries, pool);
  Buffer lse = Join(parts, sharers, &LayerInput::window_lse, pool);
  std::swap(input.window_queries, queries);
  std::swap(input.window_lse, lse);
  absl::Status status = ComputePerHead(own, backend, pool, input, heads.begin, out, parallel);
  std::swap(input.window_queries, queries);
  std::swap(input.window_lse, lse);
  return status;
}

absl::Status GivenPerHead(const Backend& backend, absl::Span<const Shard> shards,
                          absl::Span<LayerInput> parts, int64_t tokens, float* out,
                          ParallelFor parallel, int64_t* culprit) {
  for (size_t i = 0; i < parts.size(); ++i) {
    const HeadRange& heads = shards[i].kv_heads;
    absl::Status good = CheckGiven(parts[i], parts[i].saliency, heads.begin, heads.count, tokens,
                                   backend, parallel);
    if (!good.ok()) {
      *culprit = static_cast<int64_t>(i);
      return good;
    }
    const auto* part = parts[i].saliency.as<const float>();
    float* to = out + heads.begin * tokens;
    if (IsFirstOfItsHeads(shards, i)) {
      parallel(heads.count, [&](int64_t head) {
        std::copy_n(part + head * tokens, tokens, to + head * tokens);
      });
    } else {
      backend.Accumulate(/*decay=*/1.0F, part, to, tokens, parallel);
    }
  }
  return absl::OkStatus();
}

absl::Status GivenSum(const Backend& backend, absl::Span<LayerInput> parts, int64_t tokens,
                      Buffer& sum, ParallelFor parallel, int64_t* culprit) {
  for (size_t i = 0; i < parts.size(); ++i) {
    absl::Status good = CheckGiven(parts[i], parts[i].saliency, /*first_head=*/0, /*heads=*/1,
                                   tokens, backend, parallel);
    if (!good.ok()) {
      *culprit = static_cast<int64_t>(i);
      return good;
    }
    if (i == 0) {
      sum = std::move(parts[i].saliency);
    } else {
      backend.Accumulate(/*decay=*/1.0F, parts[i].saliency.as<const float>(), sum.as<float>(),
                         tokens, parallel);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<LayerSaliency> ComputeShardedSaliency(const PromptSpec& spec, const Backend& backend,
                                                     BufferPool& pool,
                                                     absl::Span<const Shard> shards,
                                                     absl::Span<LayerInput> parts,
                                                     ParallelFor parallel, int64_t* culprit) {
  const int64_t tokens = parts[0].positions.empty()
                             ? spec.prompt_tokens
                             : static_cast<int64_t>(parts[0].positions.size());
  LayerSaliency saliency;
  if (spec.statistic == Statistic::kSaliency) {
    absl::Status given = GivenSum(backend, parts, tokens, saliency.sum, parallel, culprit);
    if (!given.ok()) return given;
    return SumUp(spec, backend, pool, parts[0].layer, tokens, std::move(saliency), parallel);
  }
  saliency.per_head =
      pool.Acquire(static_cast<size_t>(spec.geometry.kv_heads * tokens) * sizeof(float));
  auto* per_head = saliency.per_head.as<float>();
  if (spec.statistic == Statistic::kSaliencyPerKvHead) {
    absl::Status given = GivenPerHead(backend, shards, parts, tokens, per_head, parallel, culprit);
    if (!given.ok()) return given;
    return SumUp(spec, backend, pool, parts[0].layer, tokens, std::move(saliency), parallel);
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!IsFirstOfItsHeads(shards, i)) continue;
    absl::Status scored = ScoreHeads(spec, backend, pool, shards, parts, i,
                                     per_head + shards[i].kv_heads.begin * tokens, parallel);
    if (scored.ok()) continue;
    // Which of several ranks sent the bad query is not known.
    if (Sharers(shards, i).size() == 1) *culprit = static_cast<int64_t>(i);
    return scored;
  }
  return SumUp(spec, backend, pool, parts[0].layer, tokens, std::move(saliency), parallel);
}

}  // namespace structkv::engine
