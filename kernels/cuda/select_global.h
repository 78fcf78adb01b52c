// A row's selection by any number of blocks through device memory, for rows that no cluster can
// hold: one launch a digit, one to measure the tiles, one to write the positions. Of each of the
// first four the last block to finish does what needs the whole row.
#pragma once

#include <cstdint>

#include "kernels/cuda/select_steps.h"

namespace structkv::cuda {

inline constexpr int kGlobalThreads = 512;

// What the blocks of a row share; zero before the first launch. Its tiles' arrays follow.
struct GlobalState {
  uint32_t bins[kDigits][kQuestions][kBins];
  Cut cuts[kDigits][kQuestions];  // after each digit
  uint32_t tickets[kDigits + 1];  // blocks that have finished, of each launch
};

// A block's shared memory.
struct GlobalShared {
  Histogram histogram;
  Cut cuts[kQuestions];
  TileCount warp_counts[kGlobalThreads / 32];
  bool last;
};

// Bytes that one row takes.
STRUCTKV_HOST_DEVICE constexpr int64_t GlobalStateBytes(int64_t tokens) {
  constexpr int64_t kAlign = 256;
  // The counts have one more, of the whole row.
  const int64_t bytes = static_cast<int64_t>(sizeof(GlobalState) + sizeof(TileCount)) +
                        Tiles(tokens) * static_cast<int64_t>(sizeof(RowSums) + sizeof(TileCount));
  return (bytes + kAlign - 1) / kAlign * kAlign;
}
static_assert(sizeof(GlobalState) % alignof(RowSums) == 0);

template <class Block>
class GlobalSelector {
 public:
  STRUCTKV_DEVICE GlobalSelector(Block& block, const SelectRow& row, void* state,
                                 GlobalShared& shared)
      : block_(block),
        row_(row),
        tiles_(static_cast<int>(Tiles(row.tokens))),
        state_(*static_cast<GlobalState*>(state)),
        sums_(reinterpret_cast<RowSums*>(&state_ + 1)),
        counts_(reinterpret_cast<TileCount*>(sums_ + tiles_)),
        shared_(shared) {}

  // The launches, in their order. Blocks 0 .. block.blocks() - 1 share the row.
  STRUCTKV_DEVICE void FindDigit(int digit) {
    ClearHistogram(block_, shared_.histogram);
    ReadCuts(digit - 1);
    const Cut cuts[kQuestions] = {shared_.cuts[kBest], shared_.cuts[kLargest]};
    ForEachTile([&](int64_t tile, const auto& key_of) {
      CountTileDigit(block_, row_, tile, digit, cuts, key_of, shared_.histogram);
    });
    block_.Sync();
    uint32_t* mine = &shared_.histogram.bins[0][0];
    uint32_t* all = &state_.bins[digit][0][0];
    for (int i = block_.thread(); i < kQuestions * kBins; i += block_.threads()) {
      if (mine[i] != 0) block_.Add(all + i, mine[i]);
    }
    if (!IsLast(digit)) return;
    for (int i = block_.thread(); i < kQuestions * kBins; i += block_.threads()) {
      mine[i] = block_.Fresh(all + i);
    }
    block_.Sync();
    SumGroups(block_, digit, cuts, shared_.histogram);
    block_.Sync();
    const Histogram& h = shared_.histogram;
    for (int question = block_.warp(); question < kQuestions; question += block_.warps()) {
      const Cut next = NextCut(
          block_, shared_.cuts[question], digit, [&](int bin) { return h.bins[question][bin]; },
          [&](int group) { return h.groups[question][group]; });
      if (block_.lane() == 0) state_.cuts[digit][question] = next;
    }
  }

  STRUCTKV_DEVICE void Measure() {
    ReadCuts(kDigits - 1);
    const Cut cuts[kQuestions] = {shared_.cuts[kBest], shared_.cuts[kLargest]};
    ForEachTile([&](int64_t tile, const auto& key_of) {
      const TileResult result = MeasureTile(block_, row_, tile, cuts, key_of);
      const SumsPart all = SumTile(block_, row_, static_cast<int>(tile));
      if (block_.lane() == 0) {
        counts_[tile] = result.count;
        sums_[tile] = {all, result.mass};
      }
    });
    if (!IsLast(kDigits)) return;
    ScanTiles(
        block_, tiles_,
        [&](int i) {
          return TileCount{block_.Fresh(&counts_[i].above), block_.Fresh(&counts_[i].equal)};
        },
        counts_, shared_.warp_counts);
    if (block_.warp() != 0) return;
    WriteSums(block_, row_, cuts[kLargest], [&](int i) {
      const RowSums& tile = sums_[i];
      return RowSums{{block_.Fresh(&tile.all.total), block_.Fresh(&tile.all.sum_s_log_s),
                      block_.Fresh(&tile.all.sum_squares)},
                     block_.Fresh(&tile.top_mass)};
    });
  }

  STRUCTKV_DEVICE void Write() {
    ReadCuts(kDigits - 1);
    const Cut cut = shared_.cuts[kBest];
    ForEachTile([&](int64_t tile, const auto& key_of) {
      WriteTile(block_, row_, tile, cut, counts_[tile], counts_[tile + 1], key_of);
    });
    WriteWindow(row_, block_.index() * block_.threads() + block_.thread(),
                block_.blocks() * block_.threads());
  }

 private:
  // The tiles of this warp, spread over the blocks.
  template <class Body>
  STRUCTKV_DEVICE void ForEachTile(const Body& body) const {
    const int64_t first = block_.index() * block_.warps() + block_.warp();
    STRUCTKV_ROLLED
    for (int64_t tile = first; tile < tiles_; tile += block_.blocks() * block_.warps()) {
      const float* scores = row_.scores + tile * kTileTokens;
      const int valid = InTile(row_.tokens, tile);
      body(tile, [=](int place) { return place < valid ? OrderedKey(scores[place]) : kNoKey; });
    }
  }

  // Those after `digit`; -1: before any. Ends with a barrier.
  STRUCTKV_DEVICE void ReadCuts(int digit) {
    const int question = block_.thread();
    if (question < kQuestions) {
      shared_.cuts[question] = digit < 0 ? FirstCut(row_, question) : state_.cuts[digit][question];
    }
    block_.Sync();
  }

  // Whether all other blocks have finished; what they wrote can be read then. All threads.
  STRUCTKV_DEVICE bool IsLast(int launch) {
    block_.Fence();
    block_.Sync();
    if (block_.thread() == 0) {
      const auto others = static_cast<uint32_t>(block_.blocks() - 1);
      shared_.last = block_.Add(&state_.tickets[launch], 1U) == others;
    }
    block_.Sync();
    block_.Fence();
    return shared_.last;
  }

  Block& block_;
  const SelectRow& row_;
  const int tiles_;
  GlobalState& state_;
  RowSums* sums_;
  TileCount* counts_;
  GlobalShared& shared_;
};

}  // namespace structkv::cuda
