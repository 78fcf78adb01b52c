// The steps of a selection, as parts of a kernel: counting digits, finding the bin of the cut,
// counting and writing what lies above it. `Block` is DeviceBlock or its twin on the host.
//
// Histograms are the only numbers that are added to in no fixed order, and they are integers.
#pragma once

#include <cstdint>

#include "kernels/cuda/select_row.h"
#include "kernels/cuda/warp.h"

namespace structkv::cuda {

// A block's histograms.
struct Histogram {
  uint32_t bins[kQuestions][kBins];
  uint32_t groups[kQuestions][kGroups];
};

// Calls body(place, key_of(place), whether it is before the window) for each place of a tile that
// is this lane's. Several keys are read before the first is used, so that reads do not wait for
// what is done with others.
template <class Block, class KeyOf, class Body>
STRUCTKV_DEVICE void ForEachKey(Block& block, const SelectRow& row, int64_t tile,
                                const KeyOf& key_of, const Body& body) {
  constexpr int kAtOnce = 4;
  const int others = InTile(Others(row), tile);
  STRUCTKV_ROLLED
  for (int step = 0; step < kTileTokens; step += kAtOnce * Block::kLanes) {
    const int first = step + block.lane();
    uint32_t keys[kAtOnce];
    STRUCTKV_UNROLL
    for (int k = 0; k < kAtOnce; ++k) keys[k] = key_of(first + k * Block::kLanes);
    STRUCTKV_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int place = k * Block::kLanes;
      body(first + place, keys[k], place < others - first);
    }
  }
}

// Counts one digit of a tile's keys; `cuts` are what is known so far. `key_of(place)` is the key of
// a token of the tile, kNoKey past the row's end. A key is counted once: for kBest where it can,
// else for kLargest. Scores are all alike often enough, and then so are bins: the hardware adds for
// all lanes of a warp at once where each adds the constant one and does not ask what was there.
template <class Block, class KeyOf>
STRUCTKV_DEVICE void CountTileDigit(Block& block, const SelectRow& row, int64_t tile, int digit,
                                    const Cut (&cuts)[kQuestions], const KeyOf& key_of,
                                    Histogram& histogram) {
  uint32_t* bins = histogram.bins[kBest];
  ForEachKey(block, row, tile, key_of, [&](int /*place*/, uint32_t key, bool other) {
    // && and || would be branches.
    const bool best = other & HasPrefix(key, cuts[kBest].threshold, digit);
    const bool largest = HasPrefix(key, cuts[kLargest].threshold, digit);
    if (best | largest) {
      uint32_t bin = DigitOf(key, digit);
      if (!best) bin += kBins;
      block.Add(bins + bin, 1U);
    }
  });
}

template <class Block>
STRUCTKV_DEVICE void ClearHistogram(Block& block, Histogram& histogram) {
  uint32_t* words = &histogram.bins[0][0];
  STRUCTKV_ROLLED
  for (int i = block.thread(); i < kQuestions * kBins; i += block.threads()) words[i] = 0;
}

// Adds what was counted for kBest to kLargest where it counts for both, and adds up the bins of
// each group. All threads; the bins are complete before, and these and the groups are after, the
// caller's barriers.
template <class Block>
STRUCTKV_DEVICE void SumGroups(Block& block, int digit, const Cut (&cuts)[kQuestions],
                               Histogram& histogram) {
  // It does where one prefix is asked for: a key has no other.
  const bool both = HasPrefix(cuts[kBest].threshold, cuts[kLargest].threshold, digit);
  for (int group = block.warp(); group < DigitBins(digit) / kGroupBins; group += block.warps()) {
    const int bin = group * kGroupBins + block.lane();
    const uint32_t best = histogram.bins[kBest][bin];
    uint32_t largest = histogram.bins[kLargest][bin];
    if (both) histogram.bins[kLargest][bin] = largest += best;
    const uint32_t best_sum = block.SumWarp(best);
    const uint32_t largest_sum = block.SumWarp(largest);
    if (block.lane() == 0) {
      histogram.groups[kBest][group] = best_sum;
      histogram.groups[kLargest][group] = largest_sum;
    }
  }
}

// Of 32 counts, one a lane, the first lane up to which they add up to `wanted`, 1 or more, and what
// lies before it. Called by a whole warp; the counts reach `wanted`.
struct Found {
  int lane = 0;
  uint32_t before = 0;
};
template <class Block>
STRUCTKV_DEVICE Found FindLane(Block& block, uint32_t count, uint32_t wanted) {
  const uint32_t up_to = SumUpTo(block, count);
  const int lane = LowestLane(block.Ballot(up_to >= wanted));
  return {lane, block.Shuffle(up_to - count, lane)};
}

// Takes one digit into a cut: the highest bin at which the counts from above reach cut.ties.
// `bin_count(b)` and `group_count(g)` give the row's counts. Called by a whole warp.
template <class Block, class BinCount, class GroupCount>
STRUCTKV_DEVICE Cut NextCut(Block& block, Cut cut, int digit, const BinCount& bin_count,
                            const GroupCount& group_count) {
  if (cut.ties == 0) return cut;
  // Lane l has the groups 2 l and 2 l + 1 from above.
  const int groups = DigitBins(digit) / kGroupBins;
  const int upper = groups - 1 - 2 * block.lane();
  const uint32_t upper_count = upper >= 0 ? group_count(upper) : 0;
  const uint32_t lower_count = upper >= 1 ? group_count(upper - 1) : 0;
  const Found pair = FindLane(block, upper_count + lower_count, cut.ties);
  cut.ties -= pair.before;
  int group = groups - 1 - 2 * pair.lane;
  const uint32_t in_upper = block.Shuffle(upper_count, pair.lane);
  if (in_upper < cut.ties) {
    cut.ties -= in_upper;
    --group;
  }
  const int last = group * kGroupBins + kGroupBins - 1;
  const Found bin = FindLane(block, bin_count(last - block.lane()), cut.ties);
  cut.ties -= bin.before;
  cut.threshold |= static_cast<uint32_t>(last - bin.lane) << DigitShift(digit);
  return cut;
}

// What a tile has above the cut and at it: of the tokens before the window for kBest, and the sum
// above it for kLargest. Called by a whole warp; all lanes get it.
struct TileResult {
  TileCount count;
  double mass = 0;
};
template <class Block, class KeyOf>
STRUCTKV_DEVICE TileResult MeasureTile(Block& block, const SelectRow& row, int64_t tile,
                                       const Cut (&cuts)[kQuestions], const KeyOf& key_of) {
  TileCount count;
  double mass = 0;
  ForEachKey(block, row, tile, key_of, [&](int /*place*/, uint32_t key, bool other) {
    if (other && key > cuts[kBest].threshold) ++count.above;
    if (other && key == cuts[kBest].threshold) ++count.equal;
    if (key > cuts[kLargest].threshold) mass += static_cast<double>(KeyValue(key));
  });
  return {{block.SumWarp(count.above), block.SumWarp(count.equal)},
          row.sums != nullptr ? SumLanes(block, mass) : 0.0};
}

template <class Block>
STRUCTKV_DEVICE TileCount SumUpTo(Block& block, const TileCount& count) {
  return {SumUpTo(block, count.above), SumUpTo(block, count.equal)};
}
template <class Block>
STRUCTKV_DEVICE TileCount Shuffle(Block& block, const TileCount& count, int from_lane) {
  return {block.Shuffle(count.above, from_lane), block.Shuffle(count.equal, from_lane)};
}

// Replaces each count by the sum of those before it, and counts[tiles] by the sum of all, which
// every thread gets. All threads; `warp_counts` has one entry a warp; ends with a barrier.
// `fresh(i)` reads counts[i].
template <class Block, class Fresh>
STRUCTKV_DEVICE TileCount ScanTiles(Block& block, int tiles, const Fresh& fresh, TileCount* counts,
                                    TileCount* warp_counts) {
  const int each = (tiles + block.warps() - 1) / block.warps();
  const int begin = block.warp() * each;
  const int end = begin + each < tiles ? begin + each : tiles;
  TileCount sum;
  for (int i = begin + block.lane(); i < end; i += Block::kLanes) sum = Plus(sum, fresh(i));
  sum = {block.SumWarp(sum.above), block.SumWarp(sum.equal)};
  if (block.lane() == 0) warp_counts[block.warp()] = sum;
  block.Sync();
  // Lane l has warp l's.
  const TileCount of_warp = block.lane() < block.warps() ? warp_counts[block.lane()] : TileCount();
  const TileCount up_to_warp = SumUpTo(block, of_warp);
  const TileCount total = Shuffle(block, up_to_warp, Block::kLanes - 1);
  TileCount before = Shuffle(block, Minus(up_to_warp, of_warp), block.warp());
  STRUCTKV_ROLLED
  for (int first = begin; first < end; first += Block::kLanes) {
    const int i = first + block.lane();
    const TileCount count = i < end ? fresh(i) : TileCount();
    const TileCount up_to = Plus(before, SumUpTo(block, count));
    if (i < end) counts[i] = Minus(up_to, count);
    before = Shuffle(block, up_to, Block::kLanes - 1);
  }
  if (block.thread() == 0) counts[tiles] = total;
  block.Sync();
  return total;
}

// Writes the positions of a tile that are kept; `before` and `after` count the row's tokens before
// the tile and before the next. Called by a whole warp.
template <class Block, class KeyOf>
STRUCTKV_DEVICE void WriteTile(Block& block, const SelectRow& row, int64_t tile, const Cut& cut,
                               const TileCount& before, const TileCount& after,
                               const KeyOf& key_of) {
  const auto first = static_cast<int32_t>(tile * kTileTokens);
  const uint32_t lower_lanes = (1U << block.lane()) - 1;
  int32_t* const positions = row.positions;
  uint32_t at = KeptBefore(before.above, before.equal, cut.ties);
  const auto write = [&](const auto& is_kept_of) {
    ForEachKey(block, row, tile, key_of, [&](int place, uint32_t key, bool other) {
      const bool is_kept = is_kept_of(key, other);
      const uint32_t kept = block.Ballot(is_kept);
      if (is_kept) positions[at + CountLanes(kept & lower_lanes)] = first + place;
      at += CountLanes(kept);
    });
  };
  if (before.equal < cut.ties && cut.ties < after.equal) {
    // The first of the tile's ties are kept.
    uint32_t ties = before.equal;
    write([&](uint32_t key, bool other) {
      const bool is_tie = other && key == cut.threshold;
      const uint32_t lanes = block.Ballot(is_tie);
      const uint32_t earlier = ties + CountLanes(lanes & lower_lanes);
      ties += CountLanes(lanes);
      return is_tie ? earlier < cut.ties : other && key > cut.threshold;
    });
  } else {
    // All of them are, or none.
    const uint32_t below = before.equal < cut.ties ? cut.threshold - 1 : cut.threshold;
    write([&](uint32_t key, bool other) { return other && key > below; });
  }
}

// Writes the window's positions. Thread `first` of `step` that share in it.
STRUCTKV_HOST_DEVICE inline void WriteWindow(const SelectRow& row, int64_t first, int64_t step) {
  if (row.positions == nullptr) return;
  STRUCTKV_ROLLED
  for (int64_t i = first; i < row.window; i += step) {
    row.positions[row.keep - row.window + i] = static_cast<int32_t>(Others(row) + i);
  }
}

// RowSums::all of a tile. Called by a whole warp; all lanes get it.
template <class Block>
STRUCTKV_DEVICE SumsPart SumTile(Block& block, const SelectRow& row, int tile) {
  constexpr int kParts = kTileTokens / kPartTokens;
  static_assert(kParts <= Block::kLanes);
  if (row.sums == nullptr || row.parts == nullptr) return {};
  const int64_t part = int64_t{tile} * kParts + block.lane();
  SumsPart mine;
  if (block.lane() < kParts && part < SumsParts(row.tokens)) mine = row.parts[part];
  return SumLanes(block, mine);
}

// The row's sums from its tiles'. Called by a whole warp.
template <class Block, class SumsAt>
STRUCTKV_DEVICE void WriteSums(Block& block, const SelectRow& row, const Cut& cut,
                               const SumsAt& sums_at) {
  if (row.sums == nullptr) return;
  RowSums sums = SumInOrder(block, static_cast<int>(Tiles(row.tokens)), sums_at);
  // With nothing wanted the threshold has no value.
  if (cut.ties != 0) {
    sums.top_mass += static_cast<double>(cut.ties) * static_cast<double>(KeyValue(cut.threshold));
  }
  if (block.lane() == 0) *row.sums = sums;
}

}  // namespace structkv::cuda
