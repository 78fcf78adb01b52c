// One row of a selection, and how it is spread over blocks.
#pragma once

#include <cstdint>

#include "kernels/cuda/radix.h"
#include "kernels/cuda/sums.h"

namespace structkv::cuda {

// Scores of which the best are selected, or the sums taken, or both, which shares what is read and
// counted. All pointers are the device's.
struct SelectRow {
  const float* scores = nullptr;  // [tokens], finite, not null
  int64_t tokens = 0;             // 1 .. 2^31 - 1
  // [keep]; the kept positions, ascending: the last `window` tokens and the best keep - window of
  // the others, ties to the lowest. Null: nothing is selected.
  int32_t* positions = nullptr;
  int64_t window = 0;  // 0 .. keep
  int64_t keep = 0;    // 0 .. tokens
  // One; null: no sums. Scores are not negative then.
  RowSums* sums = nullptr;
  int64_t top_count = 0;  // 0 .. tokens: of the largest for top_mass
  // [SumsParts(tokens)], what LaunchSaliency or LaunchStatistics has written; null: RowSums::all is
  // left at zero.
  const SumsPart* parts = nullptr;
};

// Two questions are asked of a row at a time: where the best of the tokens before the window end,
// and where the largest of all do.
enum Question : int { kBest = 0, kLargest = 1, kQuestions = 2 };

// Tokens before the window.
STRUCTKV_HOST_DEVICE constexpr int64_t Others(const SelectRow& row) {
  return row.positions == nullptr ? 0 : row.tokens - row.window;
}

// How many tokens the cut of a question is to let through.
STRUCTKV_HOST_DEVICE constexpr uint32_t Wanted(const SelectRow& row, int question) {
  if (question == kBest) {
    return row.positions == nullptr ? 0 : static_cast<uint32_t>(row.keep - row.window);
  }
  return row.sums == nullptr ? 0 : static_cast<uint32_t>(row.top_count);
}

// A question's cut before any digit is known: `ties` counts those that are still to be found.
STRUCTKV_HOST_DEVICE constexpr Cut FirstCut(const SelectRow& row, int question) {
  const uint32_t wanted = Wanted(row, question);
  return wanted == 0 ? CutOfNothing() : Cut{0, wanted};
}

// Of a tile's tokens before the window.
struct TileCount {
  uint32_t above = 0;
  uint32_t equal = 0;
};
STRUCTKV_HOST_DEVICE constexpr TileCount Plus(const TileCount& a, const TileCount& b) {
  return {a.above + b.above, a.equal + b.equal};
}
STRUCTKV_HOST_DEVICE constexpr TileCount Minus(const TileCount& a, const TileCount& b) {
  return {a.above - b.above, a.equal - b.equal};
}

// Of a row's first `tokens`, how many are in a tile.
STRUCTKV_HOST_DEVICE constexpr int InTile(int64_t tokens, int64_t tile) {
  const int left = static_cast<int>(tokens) - static_cast<int>(tile) * kTileTokens;
  return left <= 0 ? 0 : left >= kTileTokens ? kTileTokens : left;
}

// Tiles of a row that block `rank` of `ranks` takes.
struct Slice {
  int first_tile = 0;
  int tiles = 0;
};

STRUCTKV_HOST_DEVICE constexpr Slice SliceOf(int64_t tokens, int rank, int ranks) {
  const int tiles = static_cast<int>(Tiles(tokens));
  const int each = (tiles + ranks - 1) / ranks;
  const int first = rank * each < tiles ? rank * each : tiles;
  const int end = first + each < tiles ? first + each : tiles;
  return {first, end - first};
}

}  // namespace structkv::cuda
