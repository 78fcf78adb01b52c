#include "kernels/cpu/saliency.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "kernels/cpu/key_pieces.h"
#include "kernels/cpu/query_pack.h"
#include "kernels/cpu/saliency_plan.h"
#include "kernels/saliency_checks.h"

namespace structkv::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kFloatBytes = sizeof(float);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One call. The functions that take a chunk are the tasks.
class Job {
 public:
  Job(const KernelTable& table, const SaliencyParams& params, std::byte* scratch, float* out)
      : table_(table),
        params_(params),
        plan_(SaliencyPlan::Make(table, params)),
        store_(scratch),
        packed_(reinterpret_cast<float*>(
            store_ + (plan_.two_pass ? plan_.batch_units() * plan_.store_bytes : 0))),
        subtracted_(packed_ + plan_.packed_total()),
        sums_(subtracted_ + plan_.batch_units() * plan_.tile_floats),
        out_(out) {}

  absl::Status Run(BadStatistic* bad, ParallelFor parallel) {
    if (absl::Status status = Prepare(bad, parallel); !status.ok()) return status;
    if (plan_.two_pass) {
      RunTwoPasses(parallel);
    } else {
      parallel(plan_.kv_heads * plan_.chunks,
               [&](int64_t task) { OnePassChunk(task / plan_.chunks, task % plan_.chunks); });
    }
    if (!failed_.load(std::memory_order_relaxed)) return absl::OkStatus();
    return Explain(bad, parallel);
  }

 private:
  int64_t TileTokens(int64_t tile) const {
    return std::min(kTileTokens, plan_.tokens - tile * kTileTokens);
  }
  int64_t ChunkEnd(int64_t chunk) const {
    return std::min(plan_.tiles, (chunk + 1) * SaliencyPlan::kTilesPerTask);
  }
  // Whether some row of the window does not attend to some token of the tile.
  bool IsMasked(int64_t tile) const {
    return tile * kTileTokens + TileTokens(tile) > plan_.tokens - plan_.window + 1;
  }
  float* Packed(int64_t head, int64_t block) const {
    return packed_ + (head * plan_.blocks + block) * plan_.packed_floats;
  }

  absl::Status Prepare(BadStatistic* bad, ParallelFor parallel) {
    std::vector<std::optional<BadRow>> found(plan_.kv_heads * plan_.blocks);
    parallel(plan_.kv_heads * plan_.blocks, [&](int64_t unit) {
      const int64_t head = unit / plan_.blocks;
      const int64_t block = unit % plan_.blocks;
      found[unit] = PackQueries(table_, params_, plan_, head, block, Packed(head, block));
    });
    for (const std::optional<BadRow>& row : found) {
      if (row) return BadQueryError(params_, row->query_head, row->row, row->value, bad);
    }
    if (params_.lse == nullptr) return absl::OkStatus();
    for (int64_t i = 0; i < params_.queries.heads * plan_.window; ++i) {
      const float lse = params_.lse[i];
      if (!std::isfinite(lse)) {
        return BadLseError(params_, i / plan_.window, i % plan_.window, lse, bad);
      }
    }
    return absl::OkStatus();
  }

  // A tile yet without its keys.
  ScoreTile Tile(int64_t head, int64_t block, void* out) const {
    return {.queries = Packed(head, block), .rows = plan_.PaddedRows(block), .out = out};
  }
  KeyPieces Keys(int64_t head, int64_t tile) const {
    return {table_, params_.keys, plan_.pairs, head, tile * kTileTokens, TileTokens(tile)};
  }
  // Scores to powers of two.
  float Factor(int64_t head) const {
    return static_cast<float>(std::fabs(SaliencyScale(params_, head)) * kLog2E);
  }

  void Scores(int64_t head, int64_t block, int64_t tile, float* out) const {
    const auto function = plan_.pairs ? table_.bf16_scores : table_.scores;
    KeyPieces keys = Keys(head, tile);
    ScoreTile scored = Tile(head, block, out);
    while (keys.Next(&scored)) function(scored);
  }

  // Scores a tile and exponentiates. False: a score may not be finite, or an exponential be.
  bool Exponentials(int64_t head, int64_t block, int64_t tile, const float* shift, float* p,
                    float* sums, const std::byte* p_after = nullptr) const {
    if (plan_.pairs && table_.bf16_exponentials != nullptr) {
      ScoreTile scored = Tile(head, block, p);
      scored.out_after = p_after;
      return FusedExponentials(table_.bf16_exponentials, head, tile, shift, sums, scored);
    }
    const int64_t rows = plan_.PaddedRows(block);
    if (p_after != nullptr) PrefetchBytes(p_after, TileTokens(tile + 1) * rows * kFloatBytes);
    Scores(head, block, tile, p);
    return table_.exponentiate(p, TileTokens(tile), rows, Factor(head), shift, sums);
  }
  bool HalfExponentials(int64_t head, int64_t block, int64_t tile, const float* shift, uint16_t* p,
                        float* sums, const std::byte* p_after) const {
    ScoreTile scored = Tile(head, block, p);
    scored.out_element_bytes = sizeof(uint16_t);
    scored.out_after = p_after;
    return FusedExponentials(table_.bf16_half_exponentials, head, tile, shift, sums, scored);
  }
  bool FusedExponentials(decltype(KernelTable::bf16_exponentials) function, int64_t head,
                         int64_t tile, const float* shift, float* sums, ScoreTile& scored) const {
    alignas(64) float check[kRowBlock] = {};
    std::fill(sums, sums + scored.rows, 0.0F);
    bool finite = true;
    const float factor = Factor(head);
    KeyPieces keys = Keys(head, tile);
    while (keys.Next(&scored)) finite = function(scored, factor, shift, sums, check);
    return finite;
  }

  // Sets the scores that the causal mask hides.
  void Mask(int64_t block, int64_t tile, float value, float* scores) const {
    const int64_t rows = plan_.PaddedRows(block);
    for (int64_t t = 0; t < TileTokens(tile); ++t) {
      // Rows of the window before this one are earlier than the token.
      const int64_t first = tile * kTileTokens + t - (plan_.tokens - plan_.window);
      for (int64_t i = 0; i < plan_.Rows(block); ++i) {
        if ((block * kRowBlock + i) % plan_.window < first) scores[t * rows + i] = value;
      }
    }
  }

  // Scores a tile, masked, with each row's maximum. Returns whether all are finite.
  bool ScoreAndMax(int64_t head, int64_t block, int64_t tile, float* scores, float* max) const {
    const int64_t rows = plan_.PaddedRows(block);
    const int64_t tokens = TileTokens(tile);
    Scores(head, block, tile, scores);
    const float factor = Factor(head);
    if (!IsMasked(tile)) return table_.row_max(scores, tokens, rows, factor, max);
    Mask(block, tile, 0.0F, scores);
    const bool finite = table_.row_max(scores, tokens, rows, factor, max);
    Mask(block, tile, -kInfinity, scores);
    table_.row_max(scores, tokens, rows, factor, max);
    return finite;
  }

  void Fail() { failed_.store(true, std::memory_order_relaxed); }

  void OnePassChunk(int64_t head, int64_t chunk) {
    alignas(64) float scores[kTileTokens * kRowBlock];
    alignas(64) float ignored[kRowBlock];
    for (int64_t tile = chunk * SaliencyPlan::kTilesPerTask; tile < ChunkEnd(chunk); ++tile) {
      const int64_t tokens = TileTokens(tile);
      float* out = out_ + head * plan_.tokens + tile * kTileTokens;
      for (int64_t block = 0; block < plan_.blocks; ++block) {
        const int64_t rows = plan_.PaddedRows(block);
        alignas(64) float shift[kRowBlock] = {};
        alignas(64) float weight[kRowBlock] = {};
        const float* lse = params_.lse + head * plan_.group_rows + block * kRowBlock;
        for (int64_t i = 0; i < plan_.Rows(block); ++i) {
          shift[i] = static_cast<float>(lse[i] * kLog2E);
          weight[i] = Share();
        }
        if (IsMasked(tile) || !Exponentials(head, block, tile, shift, scores, ignored)) {
          if (!ScoreAndMax(head, block, tile, scores, ignored)) return Fail();
          table_.exponentiate(scores, tokens, rows, Factor(head), shift, ignored);
        }
        table_.weigh_rows(scores, tokens, rows, weight, params_.window_max, block != 0, out);
      }
      if (table_.find_bad(out, tokens) >= 0) return Fail();
    }
  }

  // Where the exponentials and statistics of a block of the current batch lie.
  struct Stored {
    std::byte* p;
    float* subtracted;
    float* sums;
  };
  Stored At(int64_t unit) const {
    return {store_ + unit * plan_.store_bytes, subtracted_ + unit * plan_.tile_floats,
            sums_ + unit * plan_.tile_floats};
  }

  // Blocks of rows whose exponentials are stored at the same time.
  struct Batch {
    int64_t first_head = 0;
    int64_t heads = 0;
    int64_t first_block = 0;
    int64_t blocks = 0;
  };

  std::vector<Batch> Batches() const {
    std::vector<Batch> batches;
    for (int64_t head = 0; head < plan_.kv_heads; head += plan_.batch_heads) {
      const int64_t heads = std::min(plan_.batch_heads, plan_.kv_heads - head);
      for (int64_t block = 0; block < plan_.blocks; block += plan_.batch_blocks) {
        batches.push_back({head, heads, block, std::min(plan_.batch_blocks, plan_.blocks - block)});
      }
    }
    return batches;
  }

  // Whether the tiles of both lie in the same places. Only the last block of a head can be smaller.
  bool AreAlike(const Batch& a, const Batch& b) const {
    return a.blocks == b.blocks && plan_.PaddedRows(a.first_block + a.blocks - 1) ==
                                       plan_.PaddedRows(b.first_block + b.blocks - 1);
  }

  // The first pass of a batch goes with the second of the batch before: a tile's exponentials are
  // read, and the next batch's written in their place while they are in the cache.
  void RunTwoPasses(ParallelFor parallel) {
    Batch previous;
    for (const Batch& batch : Batches()) {
      if (AreAlike(previous, batch)) {
        RunPasses(previous, batch, parallel);
      } else {
        RunPasses(previous, {}, parallel);
        RunPasses({}, batch, parallel);
      }
      if (failed_.load(std::memory_order_relaxed)) return;
      parallel(batch.heads * batch.blocks, [&](int64_t unit) {
        const int64_t block = batch.first_block + unit % batch.blocks;
        alignas(64) float share[kRowBlock] = {};
        std::fill(share, share + plan_.Rows(block), Share());
        const Stored stored = At(unit);
        table_.tile_weights(stored.subtracted, stored.sums, plan_.tiles, plan_.PaddedRows(block),
                            share);
      });
      previous = batch;
    }
    RunPasses(previous, {}, parallel);
  }

  void RunPasses(const Batch& second, const Batch& first, ParallelFor parallel) {
    parallel(std::max(second.heads, first.heads) * plan_.chunks, [&](int64_t task) {
      const int64_t head = task / plan_.chunks;
      const int64_t chunk = task % plan_.chunks;
      for (int64_t tile = chunk * SaliencyPlan::kTilesPerTask; tile < ChunkEnd(chunk); ++tile) {
        for (int64_t b = 0; head < second.heads && b < second.blocks; ++b) {
          SecondPass(second.first_head + head, second.first_block + b, tile,
                     At(head * second.blocks + b));
        }
        for (int64_t b = 0; head < first.heads && b < first.blocks; ++b) {
          FirstPass(first.first_head + head, first.first_block + b, tile,
                    At(head * first.blocks + b));
        }
      }
    });
  }

  void SecondPass(int64_t head, int64_t block, int64_t tile, const Stored& stored) {
    const int64_t rows = plan_.PaddedRows(block);
    const std::byte* p = stored.p + tile * kTileTokens * rows * plan_.element_bytes();
    const float* weight = stored.subtracted + tile * rows;
    float* out = out_ + head * plan_.tokens + tile * kTileTokens;
    if (plan_.half) {
      table_.weigh_half_rows(reinterpret_cast<const uint16_t*>(p), TileTokens(tile), rows, weight,
                             params_.window_max, block != 0, out);
    } else {
      table_.weigh_rows(reinterpret_cast<const float*>(p), TileTokens(tile), rows, weight,
                        params_.window_max, block != 0, out);
    }
  }

  // Into the second-level cache, where it is needed after this tile's dot products.
  static void PrefetchBytes(const std::byte* p, int64_t bytes) {
    constexpr int64_t kLine = 64;
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(p + i, 0, 2);
  }

  void FirstPass(int64_t head, int64_t block, int64_t tile, const Stored& stored) {
    const int64_t rows = plan_.PaddedRows(block);
    const int64_t tokens = TileTokens(tile);
    std::byte* p = stored.p + tile * kTileTokens * rows * plan_.element_bytes();
    auto* const as_float = reinterpret_cast<float*>(p);
    auto* const as_half = reinterpret_cast<uint16_t*>(p);
    float* subtracted = stored.subtracted + tile * rows;
    float* sums = stored.sums + tile * rows;
    const bool more = tile + 1 < plan_.tiles;
    const std::byte* p_after = more ? p + kTileTokens * rows * plan_.element_bytes() : nullptr;
    // Any maximum seen in the task will do while exponentials are not too large: it is no larger
    // than the row's.
    if (tile % SaliencyPlan::kTilesPerTask != 0 && !IsMasked(tile)) {
      std::copy(subtracted - rows, subtracted, subtracted);
      const float largest = plan_.half ? kLargestHalfSum : kLargestSum;
      if (std::all_of(subtracted, subtracted + rows,
                      [](float m) { return std::fabs(m) <= kLargestShift; }) &&
          (plan_.half ? HalfExponentials(head, block, tile, subtracted, as_half, sums, p_after)
                      : Exponentials(head, block, tile, subtracted, as_float, sums, p_after)) &&
          std::all_of(sums, sums + rows, [&](float sum) { return sum <= largest; })) {
        return;
      }
    }
    if (more) PrefetchBytes(p_after, TileTokens(tile + 1) * rows * plan_.element_bytes());
    alignas(64) float unrounded[kTileTokens * kRowBlock];
    float* const scores = plan_.half ? unrounded : as_float;
    if (!ScoreAndMax(head, block, tile, scores, subtracted)) return Fail();
    alignas(64) float shift[kRowBlock];
    for (int64_t i = 0; i < rows; ++i) {
      // Whole, so that scores which are equal are rounded alike in nearly every tile.
      if (plan_.half) subtracted[i] = std::floor(subtracted[i]) - kHalfExponent;
      // A row that sees nothing of this tile has maximum -Inf: nothing is subtracted from -Inf.
      shift[i] = subtracted[i] == -kInfinity ? 0.0F : subtracted[i];
    }
    table_.exponentiate(scores, tokens, rows, Factor(head), shift, sums);
    if (plan_.half) table_.to_half(scores, tokens * rows, as_half);
  }

  // Something was not finite: computes again to find the lowest token of any head.
  absl::Status Explain(BadStatistic* bad, ParallelFor parallel) const {
    std::vector<std::optional<BadStatistic>> found(plan_.kv_heads * plan_.chunks);
    parallel(plan_.kv_heads * plan_.chunks, [&](int64_t task) {
      found[task] = FirstBadScore(task / plan_.chunks, task % plan_.chunks);
    });
    std::optional<BadStatistic> lowest;
    for (const auto& each : found) {
      if (each && (!lowest || each->token < lowest->token)) lowest = each;
    }
    for (int64_t head = 0; !lowest && head < plan_.kv_heads; ++head) {
      for (int64_t j = 0; j < plan_.tokens; ++j) {
        const float value = out_[head * plan_.tokens + j];
        if (std::isfinite(value) || (lowest && lowest->token <= j)) continue;
        lowest = BadStatistic{head, j, value};
      }
    }
    if (!lowest) return absl::InternalError("saliency: a score that was not finite is gone");
    return BadScoreError(*lowest, bad);
  }

  std::optional<BadStatistic> FirstBadScore(int64_t head, int64_t chunk) const {
    alignas(64) float scores[kTileTokens * kRowBlock];
    alignas(64) float ignored[kRowBlock];
    std::optional<BadStatistic> first;
    for (int64_t tile = chunk * SaliencyPlan::kTilesPerTask; tile < ChunkEnd(chunk); ++tile) {
      for (int64_t block = 0; block < plan_.blocks; ++block) {
        const int64_t rows = plan_.PaddedRows(block);
        Scores(head, block, tile, scores);
        if (IsMasked(tile)) Mask(block, tile, 0.0F, scores);
        if (table_.row_max(scores, TileTokens(tile), rows, Factor(head), ignored)) continue;
        for (int64_t i = 0; i < TileTokens(tile) * rows; ++i) {
          const float value = scores[i] * Factor(head);
          const int64_t token = tile * kTileTokens + i / rows;
          if (std::isfinite(value) || (first && first->token <= token)) continue;
          first = BadStatistic{head, token, value};
        }
      }
      if (first) return first;
    }
    return std::nullopt;
  }

  // Of a row in what is summed over the window.
  float Share() const {
    return params_.window_max ? 1.0F : 1.0F / static_cast<float>(plan_.window);
  }

  const KernelTable& table_;
  const SaliencyParams& params_;
  const SaliencyPlan plan_;
  std::byte* const store_;
  float* const packed_;
  float* const subtracted_;  // the exponents that are 1; after the first pass: weights
  float* const sums_;
  float* const out_;
  std::atomic<bool> failed_{false};
};

}  // namespace

absl::Status Saliency(const KernelTable& table, const SaliencyParams& params, ScratchPool* pool,
                      float* out, BadStatistic* bad, ParallelFor parallel) {
  const ScratchPool::Block scratch = pool->Acquire(SaliencyScratchBytes(table, params));
  Job job(table, params, scratch.data(), out);
  return job.Run(bad, parallel);
}

bool KeepsHalfWeights(const KernelTable& table, const SaliencyParams& params) {
  return SaliencyPlan::Make(table, params).half;
}

int64_t SaliencyScratchBytes(const KernelTable& table, const SaliencyParams& params) {
  return SaliencyPlan::Make(table, params).scratch_bytes();
}

}  // namespace structkv::cpu
