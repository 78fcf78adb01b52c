// From keys and packed queries to scores and what is made of them, over what a block of threads can
// do (TensorBlock).
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/fused.h"
#include "kernels/cuda/pieces.h"
#include "kernels/cuda/saliency_plan.h"
#include "kernels/cuda/sums.h"

namespace structkv::cuda {

// Stands for the highest score where no row attends to any of the tokens.
inline constexpr float kLowestScore = -3.0e38F;

// What becomes of scores: stored exponentials, or under given log-sum-exps a head's sum over its
// rows, or the largest of them.
enum class Scored : uint8_t { kExps, kSum, kMax };

// A lane's scores of a block of tokens under a chunk of rows.
using ScoreFragment = float[kRowTiles][4];

// --- Scores ---

// Pieces of a block's 16 keys, of which a lane has two rows.
template <class P>
using RawKeys = uint32_t[P::kPairsInFlight][2][P::kWords];

// Where a lane's two rows are. What lies behind the last token is read in its place, and masked.
template <class P, class Block>
STRUCTKV_DEVICE void FindKeys(Block& block, const SaliencyPlan& plan, int head, int token_block,
                              const unsigned char* (&rows)[2]) {
  STRUCTKV_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int token = token_block * kBlockTokens + FragmentATokens(block.lane(), r);
    rows[r] = plan.keys +
              KeyOffset(plan, head, token < plan.tokens ? token : plan.tokens - 1, P::kKeyBytes);
  }
}

template <class P, int kPairs, class Block>
STRUCTKV_DEVICE void LoadKeys(Block& block, const SaliencyPlan& plan,
                              const unsigned char* const (&rows)[2], int first_pair,
                              RawKeys<P>& raw) {
  STRUCTKV_UNROLL
  for (int p = 0; p < P::kPairsInFlight; ++p) {
    const int dim = PieceDim(first_pair + p, block.lane());
    const bool there = kPairs != 0 ? first_pair + p < kPairs : dim < plan.dim;
    STRUCTKV_UNROLL
    for (int r = 0; r < 2; ++r) {
      const unsigned char* const from = rows[r] + dim * P::kKeyBytes;
      if (!there) {
        STRUCTKV_UNROLL
        for (int w = 0; w < P::kWords; ++w) raw[p][r][w] = 0;
      } else if constexpr (P::kWords == 2) {
        block.Once8(from, raw[p][r]);
      } else {
        STRUCTKV_UNROLL
        for (int v = 0; v < P::kWords / 4; ++v) {
          const Words4 words = block.Once16(from + 16 * v);
          STRUCTKV_UNROLL
          for (int w = 0; w < 4; ++w) raw[p][r][4 * v + w] = words.w[w];
        }
      }
    }
  }
}

template <class P, int kPairs, class Block>
STRUCTKV_DEVICE void MultiplyKeys(Block& block, const SaliencyPlan& plan, const RawKeys<P>& raw,
                                  const Words4* queries, int first_pair, ScoreFragment& scores) {
  const int pairs = kPairs != 0 ? kPairs : plan.pairs;
  STRUCTKV_UNROLL
  for (int p = 0; p < P::kPairsInFlight; ++p) {
    const int pair = first_pair + p;
    if (pair >= pairs) break;
    block.KeepOrder();
    uint32_t keys[2][P::kKeyParts][kPieceWords];
    KeyParts<P>(raw[p][0], keys[0]);
    KeyParts<P>(raw[p][1], keys[1]);
    STRUCTKV_UNROLL
    for (int q = 0; q < P::kQueryParts; ++q) {
      STRUCTKV_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        const Words4 query = block.Often16(
            queries + ((pair * P::kQueryParts + q) * kRowTiles + tile) * kLanes + block.lane());
        STRUCTKV_UNROLL
        for (int k = 0; k < P::kKeyParts; ++k) {
          if (k + q > 3) continue;
          STRUCTKV_UNROLL
          for (int step = 0; step < 2; ++step) {
            const uint32_t a[4] = {keys[0][k][PieceWord(step, 0)], keys[1][k][PieceWord(step, 0)],
                                   keys[0][k][PieceWord(step, 1)], keys[1][k][PieceWord(step, 1)]};
            block.template Multiply<P::kHalf>(a, query.w[PieceWord(step, 0)],
                                              query.w[PieceWord(step, 1)], scores[tile]);
          }
        }
      }
    }
  }
}

// Whether row `row` of a group attends to `token`.
STRUCTKV_HOST_DEVICE inline bool Attends(const SaliencyPlan& plan, int row, int token) {
  return row < plan.rows && token <= LastToken(plan.tokens, plan.window, row);
}

// Reports scores that are not finite.
template <class Block>
STRUCTKV_DEVICE void ReportScores(Block& block, const SaliencyPlan& plan, int head, int chunk,
                                  int first_token, const ScoreFragment& scores) {
  STRUCTKV_UNROLL
  for (int tile = 0; tile < kRowTiles; ++tile) {
    STRUCTKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = chunk * kChunkRows + tile * kTileRows + FragmentCRow(block.lane(), i);
      const int token = first_token + FragmentCToken(block.lane(), i);
      const float score = scores[tile][i];
      if (!IsFinite(score) && Attends(plan, row, token)) {
        block.Min(&plan.flags->score, BadScore(token, head, KindOf(score)));
      }
    }
  }
}

// Makes scores minus infinity where a row does not attend to a token.
template <class Block>
STRUCTKV_DEVICE void MaskScores(Block& block, const SaliencyPlan& plan, int chunk, int first_token,
                                ScoreFragment& scores) {
  STRUCTKV_UNROLL
  for (int tile = 0; tile < kRowTiles; ++tile) {
    STRUCTKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = chunk * kChunkRows + tile * kTileRows + FragmentCRow(block.lane(), i);
      const int token = first_token + FragmentCToken(block.lane(), i);
      if (!Attends(plan, row, token)) scores[tile][i] = -kInfinity;
    }
  }
}

// What two of a head's rows, or more of them, come to: the larger weight, or their sum.
template <bool kMax>
STRUCTKV_HOST_DEVICE inline float Joined(float a, float b) {
  return kMax ? fmaxf(a, b) : a + b;
}

// Joins the weights under the rows' given log-sum-exps to the sums of the lane's two tokens.
template <bool kMax, class Block>
STRUCTKV_DEVICE void WeighScores(Block& block, const SaliencyPlan& plan, int head, int chunk,
                                 const ScoreFragment& scores, float (&sums)[2]) {
  const float* const lse =
      plan.row_lse + static_cast<int64_t>(head) * plan.padded_rows() + chunk * kChunkRows;
  float of_chunk[2] = {0.0F, 0.0F};
  STRUCTKV_UNROLL
  for (int tile = 0; tile < kRowTiles; ++tile) {
    STRUCTKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float weight =
          Exp2(scores[tile][i] - lse[tile * kTileRows + FragmentCRow(block.lane(), i)]);
      of_chunk[i / 2] = Joined<kMax>(of_chunk[i / 2], weight);
    }
  }
  sums[0] = Joined<kMax>(sums[0], of_chunk[0]);
  sums[1] = Joined<kMax>(sums[1], of_chunk[1]);
}

// Joins the eight lane groups' values, of which there are eight, and returns the g-th to group g.
template <bool kMax, class Block>
STRUCTKV_DEVICE float JoinGroups(Block& block, float (&values)[2 * kRowTiles]) {
  STRUCTKV_UNROLL
  for (int half = kRowTiles; half > 0; half /= 2) {
    const bool upper = (LaneGroup(block.lane()) & half) != 0;
    STRUCTKV_UNROLL
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? values[half + i] : values[i];
      const float given = upper ? values[i] : values[half + i];
      values[i] = Joined<kMax>(kept, block.ShuffleXor(given, 4 * half));
    }
  }
  return values[0];
}

// Stores the exponentials relative to each row's highest score among the 16 tokens, and that and
// their sum.
template <class Block>
STRUCTKV_DEVICE void StoreExps(Block& block, const SaliencyPlan& plan, int head, int chunk,
                               int token_block, const ScoreFragment& scores) {
  // Values of a lane's eight rows, tile after tile; the lane's own is that of its group.
  float values[2 * kRowTiles];
  STRUCTKV_UNROLL
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    values[i] = fmaxf(scores[i / 2][i % 2], scores[i / 2][2 + i % 2]);
  }
  const float own_top = fmaxf(JoinGroups<true>(block, values), kLowestScore);
  Words4 halves[kRowTiles / 2];
  STRUCTKV_UNROLL
  for (int tile = 0; tile < kRowTiles; ++tile) {
    float tops[2];
    STRUCTKV_UNROLL
    for (int i = 0; i < 2; ++i) {
      tops[i] = block.Shuffle(own_top, (2 * tile + i) * 4 + LaneQuarter(block.lane()));
    }
    uint32_t* const exps = &halves[tile / 2].w[tile % 2 * 2];
    STRUCTKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      exps[half] = Halves(Exp2(scores[tile][2 * half] - tops[0]),
                          Exp2(scores[tile][2 * half + 1] - tops[1]));
    }
    values[2 * tile] = HalfToFloat(exps[0] & 0xFFFFU) + HalfToFloat(exps[1] & 0xFFFFU);
    values[2 * tile + 1] = HalfToFloat(exps[0] >> 16) + HalfToFloat(exps[1] >> 16);
  }
  const float own_sum = JoinGroups<false>(block, values);
  Words4* const to = plan.exps + ExpsIndex(plan, head, chunk, token_block) + block.lane();
  STRUCTKV_UNROLL
  for (int i = 0; i < kRowTiles / 2; ++i) to[i * kLanes] = halves[i];
  const int group = LaneGroup(block.lane());
  const int own_row = group / 2 * kTileRows + FragmentCRow(block.lane(), group % 2);
  plan.row_sums[RowSumsIndex(plan, head, chunk, token_block) + own_row] = {own_top, own_sum};
}

// Joins the sums of the four lanes that share a token, and leaves them with the head's other
// tokens, [tile tokens].
template <bool kMax, class Block>
STRUCTKV_DEVICE void LeaveSums(Block& block, const SaliencyPlan& plan, float (&sums)[2],
                               int in_tile, float* of_head) {
  STRUCTKV_UNROLL
  for (int half = 0; half < 2; ++half) {
    sums[half] = Joined<kMax>(sums[half], block.ShuffleXor(sums[half], 1));
    sums[half] = Joined<kMax>(sums[half], block.ShuffleXor(sums[half], 2));
    if (LaneQuarter(block.lane()) == 0) {
      of_head[in_tile + FragmentCToken(block.lane(), 2 * half)] =
          MultiplyRounded(sums[half], plan.share);
    }
  }
}

// One warp, one head, 64 tokens: from keys to what is made of their scores.
template <class P, int kPairs, Scored kScored, class Block>
STRUCTKV_DEVICE void ScoreUnit(Block& block, const SaliencyPlan& plan, int head, int tile, int unit,
                               float* of_head) {
  // Where all of a key fits in registers it stays there for all rows; else it is read again for
  // each chunk of them, from the L2 cache.
  constexpr bool kAtOnce = kPairs != 0 && kPairs <= P::kPairsInFlight;
  float scale = plan.scale_log2;
  if (plan.key_scales != nullptr) scale *= plan.key_scales[head];
  RawKeys<P> raw;
  const unsigned char* rows[2];
  const auto load_at_once = [&](int token_block) {
    FindKeys<P>(block, plan, head, token_block, rows);
    LoadKeys<P, kPairs>(block, plan, rows, 0, raw);
  };
  // Whether the warp goes on with it after the one before.
  const auto follows = [&](int token_block) {
    return token_block % kUnitBlocks != 0 && token_block < plan.blocks;
  };
  int token_block = (tile * plan.tile_units + unit) * kUnitBlocks;
  if (token_block >= plan.blocks) return;
  if constexpr (kAtOnce) load_at_once(token_block);
  STRUCTKV_ROLLED
  do {
    const int first_token = token_block * kBlockTokens;
    const bool masked = first_token + kBlockTokens - 1 > plan.tokens - plan.window;
    if constexpr (!kAtOnce) FindKeys<P>(block, plan, head, token_block, rows);
    float sums[2] = {0.0F, 0.0F};
    STRUCTKV_ROLLED
    for (int chunk = 0; chunk < plan.row_chunks; ++chunk) {
      const Words4* const queries = plan.packed + PackedIndex(plan, P::kQueryParts, head, chunk, 0);
      ScoreFragment scores = {};
      if constexpr (kAtOnce) {
        MultiplyKeys<P, kPairs>(block, plan, raw, queries, 0, scores);
        // The next ones come while these scores are weighed.
        if (chunk + 1 == plan.row_chunks && follows(token_block + 1)) {
          load_at_once(token_block + 1);
        }
      } else {
        const int pairs = kPairs != 0 ? kPairs : plan.pairs;
        for (int pair = 0; pair < pairs; pair += P::kPairsInFlight) {
          LoadKeys<P, kPairs>(block, plan, rows, pair, raw);
          MultiplyKeys<P, kPairs>(block, plan, raw, queries, pair, scores);
        }
      }
      block.Multiplied();
      // NaN if any score is not finite.
      float check = 0.0F;
      STRUCTKV_UNROLL
      for (int i = 0; i < 4 * kRowTiles; ++i) {
        scores[i / 4][i % 4] *= scale;
        check += scores[i / 4][i % 4] * 0.0F;
      }
      if (!(check == 0.0F)) ReportScores(block, plan, head, chunk, first_token, scores);
      if (masked || (chunk + 1) * kChunkRows > plan.rows) {
        MaskScores(block, plan, chunk, first_token, scores);
      }
      if constexpr (kScored == Scored::kExps) {
        StoreExps(block, plan, head, chunk, token_block, scores);
      } else {
        WeighScores<kScored == Scored::kMax>(block, plan, head, chunk, scores, sums);
      }
    }
    if constexpr (kScored != Scored::kExps) {
      const int in_tile = unit * kUnitTokens + token_block % kUnitBlocks * kBlockTokens;
      LeaveSums<kScored == Scored::kMax>(block, plan, sums, in_tile, of_head);
      if (LaneQuarter(block.lane()) == 0) {
        STRUCTKV_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int token = first_token + FragmentCToken(block.lane(), 2 * half);
          if (!IsFinite(sums[half]) && token < plan.tokens) {
            block.Min(&plan.flags->score, BadScore(token, head, KindOf(sums[half])));
          }
        }
      }
    }
  } while (follows(++token_block));
}

// --- Outputs ---

// Asks for what WriteTile reads of device memory.
template <class Block>
STRUCTKV_DEVICE void PrefetchTile(Block& block, const SaliencyPlan& plan, int tile) {
  constexpr int kSectorTokens = 32 / sizeof(float);
  const int i = block.thread() * kSectorTokens;
  const int64_t token = int64_t{tile} * plan.tile_tokens() + i;
  if (plan.centrality != nullptr && i < plan.tile_tokens() && token < plan.tokens) {
    block.Prefetch(plan.centrality + token);
  }
}

// Writes a tile's outputs from the heads' sums, [kv_heads, tile tokens] in shared memory, of which
// the first head's are overwritten.
template <class Block>
STRUCTKV_DEVICE void WriteTile(Block& block, const SaliencyPlan& plan, int tile, float* shared) {
  const int first = tile * plan.tile_tokens();
  STRUCTKV_ROLLED
  for (int i = block.thread(); i < plan.tile_tokens(); i += block.threads()) {
    const int token = first + i;
    if (token >= plan.tokens) break;
    const float before = plan.centrality != nullptr ? plan.centrality[token] : 0.0F;
    float sum = 0.0F;
    STRUCTKV_UNROLL_4
    for (int head = 0; head < plan.kv_heads; ++head) {
      const float value = shared[head * plan.tile_tokens() + i];
      if (plan.per_head != nullptr) plan.per_head[int64_t{head} * plan.tokens + token] = value;
      sum = AddRounded(sum, value);
    }
    if (plan.saliency != nullptr) plan.saliency[token] = sum;
    if (plan.centrality != nullptr) {
      plan.centrality[token] = FusedMultiplyAdd(plan.decay, before, sum);
    }
    shared[i] = sum;
  }
  if (plan.parts == nullptr) return;
  // In a loop of its own, which takes fewer registers. Each thread reads what it has written.
  static_assert(kUnitTokens % kPartTokens == 0);
  STRUCTKV_ROLLED
  for (int i = block.thread(); i < plan.tile_tokens(); i += block.threads()) {
    WritePart(block, first + i, plan.tokens, shared[i], plan.parts);
  }
}

// --- Kernels ---

// Keys to outputs, under given log-sum-exps, or (kExps) keys to stored exponentials. kPairs: the
// head size over kPairDims where it is known, else 0. `shared` is [kv_heads, tile tokens], not used
// with kExps. Any number of blocks.
template <class P, int kPairs, Scored kScored, class Block>
STRUCTKV_DEVICE void Scores(Block& block, const SaliencyPlan& plan, float* shared) {
  constexpr bool kStore = kScored == Scored::kExps;
  const int units = plan.kv_heads * plan.tile_units;
  for (int tile = static_cast<int>(block.index()); tile < plan.tiles;
       tile += static_cast<int>(block.blocks())) {
    if constexpr (!kStore) PrefetchTile(block, plan, tile);
    for (int u = block.warp(); u < units; u += block.warps()) {
      const int head = u % plan.kv_heads;
      ScoreUnit<P, kPairs, kScored>(block, plan, head, tile, u / plan.kv_heads,
                                    kStore ? nullptr : shared + head * plan.tile_tokens());
    }
    if constexpr (!kStore) {
      block.Sync();
      WriteTile(block, plan, tile, shared);
      block.Sync();
    }
  }
}

}  // namespace structkv::cuda
