// What each instruction set brings: one table of functions per set, chosen at run time.
//
// The functions compute; tiles, tasks and errors are the backend's. They neither allocate nor
// fail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/types/span.h"
#include "kernels/backend.h"

namespace structkv::cpu {

// Query rows (window rows of a group's query heads) that are scored together.
inline constexpr int64_t kRowBlock = 32;
// Tokens of a score tile. With kRowBlock rows it is 30 KiB: a tile stays in the first-level cache.
// A multiple of the blocks of tokens (12 and 6) that the score kernels take at a time.
inline constexpr int64_t kTileTokens = 240;

// Exponentials are relative to the maximum of an earlier tile as long as a row's sum in a tile is
// no larger.
inline constexpr float kLargestSum = 0x1p20F;
// The same of those that are stored as float16, which none of them then exceeds.
inline constexpr float kLargestHalfSum = 65504.0F;
// What is subtracted from a tile's own maximum before it is stored as float16: the maximum becomes
// 2^kHalfExponent, so that fewer exponentials fall below its range, and at most twice that, as
// whole numbers are subtracted.
inline constexpr float kHalfExponent = 7.0F;
static_assert(kTileTokens * 2 * 0x1p7F <= kLargestHalfSum);
// And as long as the maximum is no further from 0: beyond, the rounding of a product makes more
// than a factor of it.
inline constexpr float kLargestShift = 0x1p22F;

// Bytes of keys that a score kernel asks for ahead: into the second-level cache, which can wait for
// far more lines at a time than the first, and from there into the first.
inline constexpr int64_t kKeysFarBytes = 24576;
inline constexpr int64_t kKeysNearBytes = 6144;

// Scores of a tile of tokens against a block of packed query rows.
struct ScoreTile {
  // Packed as the score function says; 64-byte aligned.
  const void* queries = nullptr;
  // Padded rows: a multiple of the table's `row_multiple`, at most kRowBlock.
  int64_t rows = 0;
  // The first token's vector; any alignment.
  const std::byte* keys = nullptr;
  int64_t token_stride_bytes = 0;
  DType dtype = DType::kF32;
  int64_t dim = 0;
  int64_t tokens = 0;        // 1 .. kTileTokens
  int64_t tokens_after = 0;  // that lie behind the tile, and are scored next
  // Where the keys are copies: for each token a vector to ask for ahead, which will be copied
  // later, in place of those behind the tile, and the bytes of its elements. Else null.
  const std::byte* const* ask = nullptr;
  int64_t ask_element_bytes = 0;
  // [tokens, rows], unscaled dot products, or what the function makes of them; 64-byte aligned.
  void* out = nullptr;
  int64_t out_element_bytes = sizeof(float);
  // What will be read and written after this tile, as much as `out`; null: nothing. Any address
  // will do.
  const std::byte* out_after = nullptr;
};

// The top of a selection: values above `threshold` are in, values below are out, and of those equal
// to it the first `ties`.
struct TopCut {
  uint32_t threshold = 0;  // an ordered key, see select-inl.h
  int64_t above = 0;
  int64_t ties = 0;
};

// Keys that are laid side by side, from wherever they lie.
struct KeyRows {
  const std::byte* const* rows = nullptr;  // [tokens], any alignment
  int64_t tokens = 0;
  DType dtype = DType::kF32;
  int64_t dim = 0;
  std::byte* out = nullptr;  // [tokens, dim]; 64-byte aligned
};

struct SumsBlock {
  double total = 0;
  double sum_s_log_s = 0;
  double sum_squares = 0;
};

// Rows copied by a gather: those of `heads` heads in turn for each kept token, so that a
// destination in which they lie side by side is written from front to back.
struct CopyRows {
  int64_t heads = 1;
  int64_t rows = 0;  // of each head
  int64_t row_bytes = 0;

  // [heads, rows], heads `position_stride` apart.
  const int32_t* positions = nullptr;
  int64_t position_stride = 0;

  // Token 0 of the first head, or in blocks place 0 of block 0.
  const std::byte* source = nullptr;
  int64_t source_stride_bytes = 0;
  int64_t source_head_stride_bytes = 0;
  int64_t source_block_tokens = 0;  // 0: dense, and then the next two mean nothing
  int64_t source_block_stride_bytes = 0;
  const int32_t* block_table = nullptr;  // null: blocks in order

  // The first kept token of the first head.
  std::byte* destination = nullptr;
  int64_t destination_stride_bytes = 0;
  int64_t destination_head_stride_bytes = 0;
  int64_t destination_block_tokens = 0;  // 0: dense, and then the next two mean nothing
  int64_t destination_block_stride_bytes = 0;
  int64_t destination_place = 0;  // of the first kept token in its block

  // Whether to write past the caches.
  bool stream = false;
};

// Cosines and sines of the angles by which a key at `position` is rotated to stand at
// `new_position` (kernels/rotation.h). All of [pairs].
struct RotaryAngles {
  const float* from = nullptr;
  const float* to = nullptr;
  int64_t pairs = 0;
  int64_t position = 0;
  int64_t new_position = 0;
  float* cosines = nullptr;
  float* sines = nullptr;
};

// The rotated part of one key, on its way from `source` to `destination`; any alignment.
struct RotateRow {
  const std::byte* source = nullptr;
  std::byte* destination = nullptr;
  DType dtype = DType::kF32;
  RotaryPairing pairing = RotaryPairing::kHalfSplit;
  int64_t pairs = 0;
  const float* cosines = nullptr;
  const float* sines = nullptr;
};

struct KernelTable {
  std::string_view name;    // for STRUCTKV_CPU_TARGET, for instance "avx2"
  std::string_view device;  // for people, for instance "AVX2"

  // Rows of a block are padded to a multiple of this.
  int64_t row_multiple = 0;

  // Converts `count` elements of `dtype` to float32.
  void (*to_f32)(const std::byte* in, DType dtype, int64_t count, float* out) = nullptr;

  // Queries packed as [dim, rows] float32.
  void (*scores)(const ScoreTile& tile) = nullptr;
  // Copies keys as they are.
  void (*copy_keys)(const KeyRows& rows) = nullptr;
  // For bf16 keys, where the set has dot products of bf16 pairs, else null: queries packed as pairs
  // along dim, [dim / 2, rows], the even element in the lower half.
  void (*bf16_scores)(const ScoreTile& tile) = nullptr;
  // With them, null where they are: bf16_scores and then exponentiate. A tile may come in pieces,
  // in order: `sum` is added to, and so is `check`, both [rows] and zero before the first. The last
  // one's answer holds for the tile.
  bool (*bf16_exponentials)(const ScoreTile& tile, float factor, const float* shift, float* sum,
                            float* check) = nullptr;
  // The same, stored as float16; `sum` is of what was not rounded.
  bool (*bf16_half_exponentials)(const ScoreTile& tile, float factor, const float* shift,
                                 float* sum, float* check) = nullptr;
  // With them: copies 8-bit keys as bf16, which holds all their values.
  void (*fp8_to_bf16)(const KeyRows& rows) = nullptr;
  // max[r] = the largest of scores[t, r] * factor. Returns whether every product is finite.
  bool (*row_max)(const float* scores, int64_t tokens, int64_t rows, float factor,
                  float* max) = nullptr;
  // scores[t, r] = 2^(scores[t, r] * factor - shift[r]) in place; sum[r] = their sum over t.
  // Returns false if a score was not finite; perhaps also if scores of a row add up to more than
  // float32 holds.
  bool (*exponentiate)(float* scores, int64_t tokens, int64_t rows, float factor,
                       const float* shift, float* sum) = nullptr;
  // Rounds to float16.
  void (*to_half)(const float* in, int64_t count, uint16_t* out) = nullptr;
  // out[t] = sum (or maximum) over r of p[t, r] * weight[r], p float32 or float16; `accumulate`:
  // and of what out[t] was.
  void (*weigh_rows)(const float* p, int64_t tokens, int64_t rows, const float* weight,
                     bool maximum, bool accumulate, float* out) = nullptr;
  void (*weigh_half_rows)(const uint16_t* p, int64_t tokens, int64_t rows, const float* weight,
                          bool maximum, bool accumulate, float* out) = nullptr;
  // Turns what was subtracted in `tiles` tiles into weights, in place: with m the row's largest and
  // z = sum over tiles of sums * 2^(max - m), weight = share[r] * 2^(max - m) / z. Both [tiles,
  // rows].
  void (*tile_weights)(float* max, const float* sums, int64_t tiles, int64_t rows,
                       const float* share) = nullptr;

  void (*sum_heads)(const float* in, int64_t heads, int64_t stride, int64_t tokens,
                    float* out) = nullptr;
  // Index of the first value that is not finite or below 0; -1: none.
  int64_t (*find_bad)(const float* values, int64_t tokens) = nullptr;
  void (*accumulate)(float decay, const float* in, float* inout, int64_t tokens) = nullptr;
  // out[j] = sum (or maximum) of in[j .. j + kernel), times `factor`.
  void (*slide)(const float* in, int64_t tokens, int64_t kernel, bool maximum, float factor,
                float* out) = nullptr;

  SumsBlock (*sums)(const float* scores, int64_t tokens) = nullptr;
  // Finds the cut that leaves `top` of the scores in; 0 <= top <= tokens.
  TopCut (*find_cut)(const float* scores, int64_t tokens, int64_t top) = nullptr;
  // The value whose ordered key this is.
  float (*key_value)(uint32_t key) = nullptr;
  // Sum of the scores above the cut.
  double (*sum_above)(const float* scores, int64_t tokens, uint32_t threshold) = nullptr;
  // Writes the positions that the cut leaves in, ascending: cut.above + cut.ties of them.
  void (*collect)(const float* scores, int64_t tokens, const TopCut& cut,
                  int32_t* positions) = nullptr;

  void (*copy_rows)(const CopyRows& copy) = nullptr;

  void (*rotary_angles)(const RotaryAngles& angles) = nullptr;
  void (*rotate_row)(const RotateRow& row) = nullptr;
};

// The tables that this machine can run, best first; never empty.
absl::Span<const KernelTable> SupportedTables();

}  // namespace structkv::cpu
