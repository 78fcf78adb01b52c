#include "kernels/cpu/saliency.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "kernels/cpu/query_pack.h"
#include "kernels/cpu/saliency_plan.h"
#include "kernels/saliency_checks.h"

namespace structkv::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One call. The functions that take a chunk are the tasks.
class Job {
 public:
  Job(const KernelTable& table, const SaliencyParams& params, float* scratch, float* out)
      : table_(table),
        params_(params),
        plan_(SaliencyPlan::Make(table, params)),
        factor_(static_cast<float>(std::fabs(SaliencyScale(params)) * kLog2E)),
        packed_(scratch),
        store_(packed_ + plan_.packed_total()),
        max_(store_ + plan_.batch_units() * plan_.store_floats),
        sums_(max_ + plan_.batch_units() * plan_.tile_floats),
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

  void Scores(int64_t head, int64_t block, int64_t tile, float* out) const {
    const TensorView& k = params_.keys;
    const auto function = plan_.pairs ? table_.bf16_scores : table_.scores;
    function({.queries = Packed(head, block),
              .rows = plan_.PaddedRows(block),
              .keys = k.Row(head, tile * kTileTokens),
              .token_stride_bytes = k.token_stride * static_cast<int64_t>(DTypeSize(k.dtype)),
              .dtype = k.dtype,
              .dim = k.dim,
              .tokens = TileTokens(tile),
              .out = out});
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
    if (!IsMasked(tile)) return table_.row_max(scores, tokens, rows, factor_, max);
    Mask(block, tile, 0.0F, scores);
    const bool finite = table_.row_max(scores, tokens, rows, factor_, max);
    Mask(block, tile, -kInfinity, scores);
    table_.row_max(scores, tokens, rows, factor_, max);
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
        if (!ScoreAndMax(head, block, tile, scores, ignored)) return Fail();
        alignas(64) float shift[kRowBlock] = {};
        alignas(64) float weight[kRowBlock] = {};
        const float* lse = params_.lse + head * plan_.group_rows + block * kRowBlock;
        for (int64_t i = 0; i < plan_.Rows(block); ++i) {
          shift[i] = static_cast<float>(lse[i] * kLog2E);
          weight[i] = Share();
        }
        table_.exponentiate(scores, tokens, rows, factor_, shift, ignored);
        table_.weigh_rows(scores, tokens, rows, weight, block != 0, out);
      }
      if (table_.find_bad(out, tokens) >= 0) return Fail();
    }
  }

  // Where the exponentials and statistics of a block of the current batch lie.
  struct Stored {
    float* p;
    float* max;
    float* sums;
  };
  Stored At(int64_t unit) const {
    return {store_ + unit * plan_.store_floats, max_ + unit * plan_.tile_floats,
            sums_ + unit * plan_.tile_floats};
  }

  void RunTwoPasses(ParallelFor parallel) {
    for (int64_t head = 0; head < plan_.kv_heads; head += plan_.batch_heads) {
      const int64_t heads = std::min(plan_.batch_heads, plan_.kv_heads - head);
      for (int64_t block = 0; block < plan_.blocks; block += plan_.batch_blocks) {
        const int64_t blocks = std::min(plan_.batch_blocks, plan_.blocks - block);
        RunBatch(head, heads, block, blocks, parallel);
        if (failed_.load(std::memory_order_relaxed)) return;
      }
    }
  }

  void RunBatch(int64_t first_head, int64_t heads, int64_t first_block, int64_t blocks,
                ParallelFor parallel) {
    parallel(heads * plan_.chunks, [&](int64_t task) {
      const int64_t head = task / plan_.chunks;
      const int64_t chunk = task % plan_.chunks;
      for (int64_t tile = chunk * SaliencyPlan::kTilesPerTask; tile < ChunkEnd(chunk); ++tile) {
        for (int64_t b = 0; b < blocks; ++b) {
          FirstPass(first_head + head, first_block + b, tile, At(head * blocks + b));
        }
      }
    });
    if (failed_.load(std::memory_order_relaxed)) return;
    parallel(heads * blocks, [&](int64_t unit) {
      const int64_t block = first_block + unit % blocks;
      alignas(64) float share[kRowBlock] = {};
      std::fill(share, share + plan_.Rows(block), Share());
      const Stored stored = At(unit);
      table_.tile_weights(stored.max, stored.sums, plan_.tiles, plan_.PaddedRows(block), share);
    });
    parallel(heads * plan_.chunks, [&](int64_t task) {
      const int64_t head = task / plan_.chunks;
      const int64_t chunk = task % plan_.chunks;
      for (int64_t tile = chunk * SaliencyPlan::kTilesPerTask; tile < ChunkEnd(chunk); ++tile) {
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t rows = plan_.PaddedRows(first_block + b);
          const Stored stored = At(head * blocks + b);
          table_.weigh_rows(stored.p + tile * kTileTokens * rows, TileTokens(tile), rows,
                            stored.max + tile * rows, first_block + b != 0,
                            out_ + (first_head + head) * plan_.tokens + tile * kTileTokens);
        }
      }
    });
  }

  void FirstPass(int64_t head, int64_t block, int64_t tile, const Stored& stored) {
    const int64_t rows = plan_.PaddedRows(block);
    float* p = stored.p + tile * kTileTokens * rows;
    float* max = stored.max + tile * rows;
    if (!ScoreAndMax(head, block, tile, p, max)) return Fail();
    alignas(64) float shift[kRowBlock];
    // A row that sees nothing of this tile has maximum -Inf: nothing is subtracted from -Inf.
    for (int64_t i = 0; i < rows; ++i) shift[i] = max[i] == -kInfinity ? 0.0F : max[i];
    table_.exponentiate(p, TileTokens(tile), rows, factor_, shift, stored.sums + tile * rows);
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
        if (table_.row_max(scores, TileTokens(tile), rows, factor_, ignored)) continue;
        for (int64_t i = 0; i < TileTokens(tile) * rows; ++i) {
          const float value = scores[i] * factor_;
          const int64_t token = tile * kTileTokens + i / rows;
          if (std::isfinite(value) || (first && first->token <= token)) continue;
          first = BadStatistic{head, token, value};
        }
      }
      if (first) return first;
    }
    return std::nullopt;
  }

  float Share() const { return 1.0F / static_cast<float>(plan_.window); }

  const KernelTable& table_;
  const SaliencyParams& params_;
  const SaliencyPlan plan_;
  const float factor_;  // scores to powers of two
  float* const packed_;
  float* const store_;
  float* const max_;  // after the first pass: weights
  float* const sums_;
  float* const out_;
  std::atomic<bool> failed_{false};
};

}  // namespace

absl::Status Saliency(const KernelTable& table, const SaliencyParams& params, ScratchPool* pool,
                      float* out, BadStatistic* bad, ParallelFor parallel) {
  const ScratchPool::Block scratch = pool->Acquire(SaliencyScratchBytes(table, params));
  Job job(table, params, reinterpret_cast<float*>(scratch.data()), out);
  return job.Run(bad, parallel);
}

int64_t SaliencyScratchBytes(const KernelTable& table, const SaliencyParams& params) {
  return SaliencyPlan::Make(table, params).scratch_floats() * static_cast<int64_t>(sizeof(float));
}

}  // namespace structkv::cpu
