// The steps of a selection, as parts of a kernel: counting digits, finding the bin of the cut,
// counting and writing what lies above it. `Block` is DeviceBlock or its twin on the host.
//
// Histograms are the only numbers that are added to in no fixed order, and they are integers.
#pragma once

#include <cstdint>

#include "kernels/cuda/select_row.h"
#include "kernels/cuda/warp.h"

namespace structkv::cuda {

// A block's histograms. At the first digit, where every token counts, kLargest has those of the
// window alone: the others are counted once for both.
struct Histogram {
  uint32_t bins[kQuestions][kBins];
  uint32_t groups[kQuestions][kGroups];
};

// Adds one to `bin` for each lane that is `in`. Lanes that agree with the first count at once:
// scores are all alike often enough, and equal addresses wait for each other.
template <class Block>
STRUCTKV_DEVICE void CountBin(Block& block, uint32_t* bins, uint32_t bin, bool in) {
  const uint32_t lanes = block.Ballot(in);
  if (lanes == 0) return;
  const int first = LowestLane(lanes);
  const uint32_t first_bin = block.Shuffle(bin, first);
  const bool same = in && bin == first_bin;
  const uint32_t alike = block.Ballot(same);
  if (block.lane() == first) {
    block.Add(bins + bin, CountLanes(alike));
  } else if (in && !same) {
    block.Add(bins + bin, 1U);
  }
}

// Counts one digit of a tile's keys. `key_of(i)` is called for the tile's tokens alone; `cuts` are
// what is known so far.
template <class Block, class KeyOf>
STRUCTKV_DEVICE void CountTileDigit(Block& block, const SelectRow& row, int64_t tile, int digit,
                                    const Cut (&cuts)[kQuestions], const KeyOf& key_of,
                                    Histogram& histogram) {
  const int64_t begin = tile * kTileTokens;
  const int64_t others = Others(row);
  const bool best = cuts[kBest].ties != 0;
  const bool largest = cuts[kLargest].ties != 0;
  for (int step = 0; step < kTileTokens; step += Block::kLanes) {
    const int place = step + block.lane();
    const int64_t token = begin + place;
    const bool valid = token < row.tokens;
    const uint32_t key = valid ? key_of(place) : 0;
    const uint32_t bin = DigitOf(key, digit);
    if (digit == 0) {
      CountBin(block, histogram.bins[kBest], bin, token < others);
      if (largest) CountBin(block, histogram.bins[kLargest], bin, valid && token >= others);
    } else {
      if (best) {
        CountBin(block, histogram.bins[kBest], bin,
                 token < others && HasPrefix(key, cuts[kBest].threshold, digit));
      }
      if (largest) {
        CountBin(block, histogram.bins[kLargest], bin,
                 valid && HasPrefix(key, cuts[kLargest].threshold, digit));
      }
    }
  }
}

template <class Block>
STRUCTKV_DEVICE void ClearHistogram(Block& block, Histogram& histogram) {
  uint32_t* words = &histogram.bins[0][0];
  for (int i = block.thread(); i < kQuestions * kBins; i += block.threads()) words[i] = 0;
}

// Adds up the bins of each group. All threads; the bins are complete before and the groups are
// after the caller's barriers.
template <class Block>
STRUCTKV_DEVICE void SumGroups(Block& block, Histogram& histogram) {
  for (int g = block.warp(); g < kQuestions * kGroups; g += block.warps()) {
    const int question = g / kGroups;
    const int group = g % kGroups;
    const uint32_t sum = block.SumWarp(histogram.bins[question][group * kGroupBins + block.lane()]);
    if (block.lane() == 0) histogram.groups[question][group] = sum;
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

// A question's count of a bin or group, from counts of both questions.
STRUCTKV_HOST_DEVICE constexpr uint32_t CountFor(int question, int digit, uint32_t best,
                                                 uint32_t largest) {
  return question == kBest ? best : digit == 0 ? best + largest : largest;
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
  const int64_t begin = tile * kTileTokens;
  const int64_t others = Others(row);
  TileResult result;
  double mass = 0;
  for (int step = 0; step < kTileTokens; step += Block::kLanes) {
    const int place = step + block.lane();
    const int64_t token = begin + place;
    const bool valid = token < row.tokens;
    const uint32_t key = valid ? key_of(place) : 0;
    const bool other = token < others;
    result.count.above += CountLanes(block.Ballot(other && key > cuts[kBest].threshold));
    result.count.equal += CountLanes(block.Ballot(other && key == cuts[kBest].threshold));
    if (valid && key > cuts[kLargest].threshold) mass += static_cast<double>(KeyValue(key));
  }
  result.mass = row.sums != nullptr ? SumLanes(block, mass) : 0.0;
  return result;
}

// Replaces each count by the sum of those before it; returns the sum of all to every thread. All
// threads; `warp_counts` has one entry a warp; ends with a barrier. `fresh(i)` reads counts[i].
template <class Block, class Fresh>
STRUCTKV_DEVICE TileCount ScanTiles(Block& block, int64_t tiles, const Fresh& fresh,
                                    TileCount* counts, TileCount* warp_counts) {
  const int64_t each = (tiles + block.warps() - 1) / block.warps();
  const int64_t begin = block.warp() * each;
  const int64_t end = begin + each < tiles ? begin + each : tiles;
  TileCount sum;
  for (int64_t i = begin + block.lane(); i < end; i += Block::kLanes) {
    const TileCount count = fresh(i);
    sum.above += count.above;
    sum.equal += count.equal;
  }
  sum = {block.SumWarp(sum.above), block.SumWarp(sum.equal)};
  if (block.lane() == 0) warp_counts[block.warp()] = sum;
  block.Sync();
  TileCount before;
  TileCount total;
  for (int w = 0; w < block.warps(); ++w) {
    if (w == block.warp()) before = total;
    total.above += warp_counts[w].above;
    total.equal += warp_counts[w].equal;
  }
  for (int64_t first = begin; first < end; first += Block::kLanes) {
    const int64_t i = first + block.lane();
    const TileCount count = i < end ? fresh(i) : TileCount();
    const TileCount up_to = {SumUpTo(block, count.above), SumUpTo(block, count.equal)};
    if (i < end) {
      counts[i] = {before.above + up_to.above - count.above,
                   before.equal + up_to.equal - count.equal};
    }
    before.above += block.Shuffle(up_to.above, Block::kLanes - 1);
    before.equal += block.Shuffle(up_to.equal, Block::kLanes - 1);
  }
  block.Sync();
  return total;
}

// Writes the positions of a tile that are kept; `before` counts the row's tokens before the tile.
// Called by a whole warp.
template <class Block, class KeyOf>
STRUCTKV_DEVICE void WriteTile(Block& block, const SelectRow& row, int64_t tile, const Cut& cut,
                               TileCount before, const KeyOf& key_of) {
  const int64_t begin = tile * kTileTokens;
  const int64_t others = Others(row);
  const uint32_t lower_lanes = (1U << block.lane()) - 1;
  for (int step = 0; step < kTileTokens; step += Block::kLanes) {
    const int place = step + block.lane();
    const int64_t token = begin + place;
    const bool other = token < others;
    const uint32_t key = other ? key_of(place) : 0;
    const bool is_above = other && key > cut.threshold;
    const bool is_equal = other && key == cut.threshold;
    const uint32_t above = block.Ballot(is_above);
    const uint32_t equal = block.Ballot(is_equal);
    const uint32_t my_above = before.above + CountLanes(above & lower_lanes);
    const uint32_t my_equal = before.equal + CountLanes(equal & lower_lanes);
    if (is_above || (is_equal && my_equal < cut.ties)) {
      row.positions[KeptBefore(my_above, my_equal, cut.ties)] = static_cast<int32_t>(token);
    }
    before.above += CountLanes(above);
    before.equal += CountLanes(equal);
  }
}

// Writes the window's positions. Thread `first` of `step` that share in it.
STRUCTKV_HOST_DEVICE inline void WriteWindow(const SelectRow& row, int64_t first, int64_t step) {
  if (row.positions == nullptr) return;
  for (int64_t i = first; i < row.window; i += step) {
    row.positions[row.keep - row.window + i] = static_cast<int32_t>(Others(row) + i);
  }
}

// The sums of a row whose tiles' masses are `mass_at`. Called by a whole warp.
template <class Block, class MassAt>
STRUCTKV_DEVICE void WriteSums(Block& block, const SelectRow& row, const Cut& cut,
                               const MassAt& mass_at) {
  if (row.sums == nullptr) return;
  const int64_t tiles = Tiles(row.tokens);
  RowSums sums;
  if (row.parts != nullptr) {
    const int64_t parts = SumsParts(row.tokens);
    sums.all = {SumInOrder(block, parts, [&](int64_t i) { return row.parts[i].total; }),
                SumInOrder(block, parts, [&](int64_t i) { return row.parts[i].sum_s_log_s; }),
                SumInOrder(block, parts, [&](int64_t i) { return row.parts[i].sum_squares; })};
  }
  sums.top_mass = SumInOrder(block, tiles, mass_at);
  // With nothing wanted the threshold has no value.
  if (cut.ties != 0) {
    sums.top_mass += static_cast<double>(cut.ties) * static_cast<double>(KeyValue(cut.threshold));
  }
  if (block.lane() == 0) *row.sums = sums;
}

}  // namespace structkv::cuda
