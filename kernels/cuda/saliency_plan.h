// How a saliency call is cut up and where its parts lie; a function of the shapes alone.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels/cuda/fragments.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/sums.h"
#include "kernels/cuda/token_offset.h"
#include "kernels/tensor.h"

namespace structkv::cuda {

inline constexpr int kSaliencyThreads = 256;
inline constexpr int kCombineThreads = 512;
inline constexpr int kCombineRows = 4;  // of a block: their row sums are a sector of 32 bytes
inline constexpr int kUnitBlocks = 4;   // blocks of 16 tokens that a warp takes one after the other
inline constexpr int kUnitTokens = kUnitBlocks * kBlockTokens;
inline constexpr int kMaxKvHeads = 128;

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What was found not to be finite; all ones where nothing was. Written by LaunchSaliency.
struct SaliencyFlags {
  uint64_t score;  // BadScore: a score, or (with the caller's log-sum-exp) a weight
  uint64_t query;  // BadRow: an element of a query
  uint64_t lse;    // BadRow
};
inline constexpr uint64_t kNothingBad = ~uint64_t{0};

enum BadKind : uint32_t { kNotANumber = 0, kInfinite = 1, kMinusInfinite = 2 };

STRUCTKV_HOST_DEVICE inline uint32_t KindOf(float value) {
  const uint32_t bits = FloatBits(value);
  if ((bits & 0x7FFFFFU) != 0) return kNotANumber;
  return bits >> 31 != 0 ? kMinusInfinite : kInfinite;
}
// The least is the lowest token, of its heads the lowest.
STRUCTKV_HOST_DEVICE constexpr uint64_t BadScore(int64_t token, int head, uint32_t kind) {
  return static_cast<uint64_t>(token) << 32 | static_cast<uint64_t>(head) << 2 | kind;
}
STRUCTKV_HOST_DEVICE constexpr int64_t BadToken(uint64_t flag) {
  return static_cast<int64_t>(flag >> 32);
}
STRUCTKV_HOST_DEVICE constexpr int BadHead(uint64_t flag) {
  return static_cast<int>(flag >> 2 & 0x3FFFFFFFU);
}
// Row: query head * window + row of the window.
STRUCTKV_HOST_DEVICE constexpr uint64_t BadRow(int64_t row, uint32_t kind) {
  return static_cast<uint64_t>(row) << 2 | kind;
}
STRUCTKV_HOST_DEVICE constexpr int64_t BadRowIndex(uint64_t flag) {
  return static_cast<int64_t>(flag >> 2);
}
STRUCTKV_HOST_DEVICE constexpr uint32_t BadKindOf(uint64_t flag) { return flag & 3U; }

// A call. All pointers are the device's; the views too, block_table included.
struct SaliencyRequest {
  TensorView queries;  // [query_heads, window, dim], dense, f16, bf16 or f32
  // [kv_heads, tokens, dim], dense or paged, of the queries' type or 8 bits wide. dim is a multiple
  // of 8, tokens at most 2^30; data and strides are multiples of 16 bytes, of 8-bit keys 8.
  TensorView keys;
  const float* lse = nullptr;         // [query_heads, window]; null: computed
  float scale = 0.0F;                 // of the scores, not 0
  const float* key_scales = nullptr;  // [kv_heads]; null: 1
  bool window_max = false;            // as SaliencyParams

  float* per_head = nullptr;  // [kv_heads, tokens]; null: not written
  // [tokens], the sum over the heads, in their order; null: not written.
  float* saliency = nullptr;
  // [tokens]: centrality = decay * centrality + saliency; null: not touched.
  float* centrality = nullptr;
  float decay = 0.0F;
  // [SumsParts(tokens)], of the saliency (kernels/cuda/sums.h); null: not written.
  SumsPart* parts = nullptr;

  SaliencyFlags* flags = nullptr;  // not null
  void* workspace = nullptr;       // 16-byte aligned, of SaliencyWorkspaceBytes
  int64_t workspace_bytes = 0;
};

// The call as the kernels see it.
struct SaliencyPlan {
  const unsigned char* keys;
  int64_t head_stride;  // strides of keys and queries in elements
  int64_t token_stride;
  const int32_t* block_table;
  int block_tokens;
  int64_t block_stride;
  const unsigned char* queries;
  int64_t query_head_stride;
  int64_t query_row_stride;
  const float* lse;
  const float* key_scales;
  float scale_log2;  // scale / ln 2
  float share;       // of a row in its head's sum: 1 / window; 1 under window_max

  int tokens;
  int dim;
  int kv_heads;
  int group;
  int window;
  int rows;        // group * window, head after head
  int row_chunks;  // of kChunkRows
  int pairs;       // of kPairDims
  int blocks;      // of kBlockTokens
  int tile_units;  // units of a head in a tile
  int tiles;
  bool window_max;  // the largest of a head's rows in place of their sum

  // The workspace's parts.
  Words4* packed;  // [kv_heads, row_chunks, pairs, query parts, kRowTiles, kLanes]
  float* row_lse;  // [kv_heads, padded rows], over ln 2; infinite for rows that are not there
  Words4* exps;    // [kv_heads, row_chunks, blocks, 2, kLanes]: a lane's 16 scores
  // [kv_heads, row_chunks, blocks, kChunkRows]: highest score, sum of exponentials
  Floats2* row_sums;

  float* per_head;
  float* saliency;
  float* centrality;
  float decay;
  SumsPart* parts;
  SaliencyFlags* flags;

  STRUCTKV_HOST_DEVICE int padded_rows() const { return row_chunks * kChunkRows; }
  STRUCTKV_HOST_DEVICE int tile_tokens() const { return tile_units * kUnitTokens; }
};

// Bytes from the keys' data to the vector of `token` in `head`.
STRUCTKV_HOST_DEVICE inline int64_t KeyOffset(const SaliencyPlan& plan, int head, int token,
                                              int element_bytes) {
  return (head * plan.head_stride + TokenOffset(token, plan.token_stride, plan.block_tokens,
                                                plan.block_stride, plan.block_table)) *
         element_bytes;
}

// Row `row` of a group is window row row % window; it attends to tokens up to this one.
STRUCTKV_HOST_DEVICE constexpr int LastToken(int tokens, int window, int row) {
  return tokens - window + row % window;
}

STRUCTKV_HOST_DEVICE constexpr int64_t PackedIndex(const SaliencyPlan& plan, int parts, int head,
                                                   int chunk, int pair) {
  return ((static_cast<int64_t>(head) * plan.row_chunks + chunk) * plan.pairs + pair) * parts *
         kRowTiles * kLanes;
}
STRUCTKV_HOST_DEVICE constexpr int64_t ExpsIndex(const SaliencyPlan& plan, int head, int chunk,
                                                 int block) {
  return ((static_cast<int64_t>(head) * plan.row_chunks + chunk) * plan.blocks + block) * 2 *
         kLanes;
}
STRUCTKV_HOST_DEVICE constexpr int64_t RowSumsIndex(const SaliencyPlan& plan, int head, int chunk,
                                                    int block) {
  return ((static_cast<int64_t>(head) * plan.row_chunks + chunk) * plan.blocks + block) *
         kChunkRows;
}

// The plan of a request whose shapes make sense.
inline SaliencyPlan MakeSaliencyPlan(const SaliencyRequest& r) {
  const auto up = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  SaliencyPlan plan = {};
  plan.keys = static_cast<const unsigned char*>(r.keys.data);
  plan.head_stride = r.keys.head_stride;
  plan.token_stride = r.keys.token_stride;
  plan.block_table = r.keys.block_table;
  plan.block_tokens = static_cast<int>(r.keys.block_tokens);
  plan.block_stride = r.keys.block_stride;
  plan.queries = static_cast<const unsigned char*>(r.queries.data);
  plan.query_head_stride = r.queries.head_stride;
  plan.query_row_stride = r.queries.token_stride;
  plan.lse = r.lse;
  plan.key_scales = r.key_scales;
  constexpr double kLog2E = 1.4426950408889634;
  plan.scale_log2 = static_cast<float>(r.scale * kLog2E);
  plan.window_max = r.window_max;
  plan.share =
      r.window_max ? 1.0F : static_cast<float>(1.0 / static_cast<double>(r.queries.tokens));
  plan.tokens = static_cast<int>(r.keys.tokens);
  plan.dim = static_cast<int>(r.keys.dim);
  plan.kv_heads = static_cast<int>(r.keys.heads);
  plan.group = static_cast<int>(r.queries.heads / r.keys.heads);
  plan.window = static_cast<int>(r.queries.tokens);
  plan.rows = plan.group * plan.window;
  plan.row_chunks = up(plan.rows, kChunkRows);
  plan.pairs = up(plan.dim, kPairDims);
  plan.blocks = up(plan.tokens, kBlockTokens);
  // Few heads: each warp of a block still has a unit.
  plan.tile_units = up(kSaliencyThreads / kLanes, plan.kv_heads);
  plan.tiles = up(plan.tokens, plan.tile_tokens());
  plan.per_head = r.per_head;
  plan.saliency = r.saliency;
  plan.centrality = r.centrality;
  plan.decay = r.decay;
  plan.parts = r.parts;
  plan.flags = r.flags;
  return plan;
}

// Sets the workspace's parts, one after the other from `base` on; returns its bytes.
inline int64_t LayOutWorkspace(SaliencyPlan* plan, DType query_type, void* base) {
  const int64_t padded = int64_t{plan->kv_heads} * plan->padded_rows();
  const int parts = query_type == DType::kF32 ? 3 : 1;
  const int64_t packed = PackedIndex(*plan, parts, plan->kv_heads, 0, 0);
  const bool stores = plan->lse == nullptr;
  const int64_t exps = stores ? ExpsIndex(*plan, plan->kv_heads, 0, 0) : 0;
  const int64_t sums = stores ? RowSumsIndex(*plan, plan->kv_heads, 0, 0) : 0;
  auto* at = static_cast<unsigned char*>(base);
  const auto place = [&at](auto** part, int64_t count) {
    *part = reinterpret_cast<std::remove_reference_t<decltype(*part)>>(at);
    at += count * static_cast<int64_t>(sizeof(**part));
  };
  place(&plan->packed, packed);
  place(&plan->exps, exps);
  place(&plan->row_sums, sums);
  place(&plan->row_lse, padded);
  return at - static_cast<unsigned char*>(base);
}

// Bytes of workspace of a call, of which the pointers need not be set but for lse's being null or
// not.
inline int64_t SaliencyWorkspaceBytes(const SaliencyRequest& r) {
  SaliencyPlan plan = MakeSaliencyPlan(r);
  return LayOutWorkspace(&plan, r.queries.dtype, nullptr);
}

}  // namespace structkv::cuda
