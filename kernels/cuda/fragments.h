// Which lane of a warp holds which element in mma.sync.m16n8k16 with 16-bit inputs (PTX ISA,
// "Matrix Fragments for mma.m16n8k16 with floating point type"), and which element of a key or
// query is put there.
//
// Keys are A, 16 tokens by 16 elements; queries are B, 16 elements by 8 rows; C has the scores, 16
// tokens by 8 rows. The sum over the elements has no order of its own, so elements are taken as
// they come with wide loads: in a "pair" of two multiplications, 32 elements of a row, the lane
// with quarter t loads elements 8 t .. 8 t + 7 at once, and those are all it needs of that row.
#pragma once

#include <cstdint>

#include "kernels/cuda/host_device.h"

namespace structkv::cuda {

inline constexpr int kLanes = 32;
inline constexpr int kBlockTokens = 16;  // M
inline constexpr int kTileRows = 8;      // N
inline constexpr int kRowTiles = 4;      // multiplications side by side
inline constexpr int kChunkRows = kRowTiles * kTileRows;
inline constexpr int kPairDims = 32;   // elements of two multiplications
inline constexpr int kPieceDims = 8;   // of which a lane loads so many
inline constexpr int kPieceWords = 4;  // registers of two elements each

STRUCTKV_HOST_DEVICE constexpr int LaneGroup(int lane) { return lane / 4; }
STRUCTKV_HOST_DEVICE constexpr int LaneQuarter(int lane) { return lane % 4; }

// Token of element `half` (0: the low 16 bits) of A's register 0 .. 3.
STRUCTKV_HOST_DEVICE constexpr int FragmentATokens(int lane, int reg) {
  return LaneGroup(lane) + 8 * (reg % 2);
}
STRUCTKV_HOST_DEVICE constexpr int FragmentAElement(int lane, int reg, int half) {
  return 2 * LaneQuarter(lane) + half + 8 * (reg / 2);
}
// B's register 0 or 1.
STRUCTKV_HOST_DEVICE constexpr int FragmentBElement(int lane, int reg, int half) {
  return 2 * LaneQuarter(lane) + half + 8 * reg;
}
STRUCTKV_HOST_DEVICE constexpr int FragmentBRow(int lane) { return LaneGroup(lane); }
// C's register 0 .. 3.
STRUCTKV_HOST_DEVICE constexpr int FragmentCToken(int lane, int reg) {
  return LaneGroup(lane) + 8 * (reg / 2);
}
STRUCTKV_HOST_DEVICE constexpr int FragmentCRow(int lane, int reg) {
  return 2 * LaneQuarter(lane) + reg % 2;
}

// The first of the elements that a lane loads of a row for a pair.
STRUCTKV_HOST_DEVICE constexpr int PieceDim(int pair, int lane) {
  return pair * kPairDims + LaneQuarter(lane) * kPieceDims;
}
// The element of a key or query that multiplication `step` (0, 1) of a pair takes as its `element`.
STRUCTKV_HOST_DEVICE constexpr int PermutedDim(int pair, int step, int element) {
  const int quarter = element % 8 / 2;
  return pair * kPairDims + quarter * kPieceDims + step * 4 + element / 8 * 2 + element % 2;
}
// The word of a piece for multiplication `step`, elements 0 .. 7 or (upper) 8 .. 15.
STRUCTKV_HOST_DEVICE constexpr int PieceWord(int step, int upper) { return 2 * step + upper; }

}  // namespace structkv::cuda
