// A row's selection by the blocks of one cluster: each keeps its slice of the row in shared memory,
// so that scores are read from device memory once, and the blocks read each other's histograms
// there.
#pragma once

#include <cstdint>

#include "kernels/cuda/select_steps.h"

namespace structkv::cuda {

inline constexpr int kClusterThreads = 1024;
inline constexpr int kMaxClusterBlocks = 8;  // what every chip with clusters can do

// A block's shared memory; its tiles follow.
struct ClusterShared {
  Histogram histograms[kDigits];
  Cut cuts[kQuestions];
  TileCount total;
  TileCount warp_counts[kClusterThreads / 32];
};
struct ClusterTile {
  uint32_t keys[kTileTokens];
};
struct ClusterTiles {
  ClusterTile* keys = nullptr;
  RowSums* sums = nullptr;
  TileCount* counts = nullptr;
};

inline constexpr int64_t kClusterTileBytes =
    sizeof(ClusterTile) + sizeof(RowSums) + sizeof(TileCount);
static_assert(sizeof(ClusterShared) % alignof(RowSums) == 0);

STRUCTKV_HOST_DEVICE constexpr int64_t ClusterSharedBytes(int64_t tiles) {
  // The counts have one more, of the whole slice.
  return static_cast<int64_t>(sizeof(ClusterShared) + sizeof(TileCount)) +
         tiles * kClusterTileBytes;
}

// Blocks of the cluster for a row of so many tiles, where a block's shared memory has room for
// `room` tiles and a cluster has `most` blocks, a power of two; 0: the row does not fit. A warp has
// a tile, then clusters grow, then warps have several.
STRUCTKV_HOST_DEVICE constexpr int ClusterBlocks(int64_t tiles, int64_t room, int most) {
  int blocks = 1;
  while (blocks < most && tiles > blocks * int64_t{kClusterThreads / 32}) blocks *= 2;
  while (blocks < most && tiles > blocks * room) blocks *= 2;
  return tiles <= blocks * room ? blocks : 0;
}

template <class Block>
class ClusterSelector {
 public:
  // `shared` has ClusterSharedBytes of the tiles of SliceOf(row.tokens, 0, block.ranks()).
  STRUCTKV_DEVICE ClusterSelector(Block& block, const SelectRow& row, void* shared)
      : block_(block),
        row_(row),
        most_(SliceOf(row.tokens, 0, block.ranks()).tiles),
        slice_(SliceOf(row.tokens, block.rank(), block.ranks())),
        shared_(*static_cast<ClusterShared*>(shared)) {
    tiles_.sums = reinterpret_cast<RowSums*>(&shared_ + 1);
    tiles_.counts = reinterpret_cast<TileCount*>(tiles_.sums + most_);
    tiles_.keys = reinterpret_cast<ClusterTile*>(tiles_.counts + most_ + 1);
  }

  STRUCTKV_DEVICE void Run() {
    for (Histogram& histogram : shared_.histograms) ClearHistogram(block_, histogram);
    if (block_.thread() < kQuestions) {
      shared_.cuts[block_.thread()] = FirstCut(row_, block_.thread());
    }
    TakeTiles();
    block_.Sync();
    STRUCTKV_ROLLED
    for (int digit = 0; digit < kDigits; ++digit) FindDigit(digit);
    MeasureTiles();
    if (block_.rank() == 0 && block_.warp() == 0) {
      WriteSums(block_, row_, shared_.cuts[kLargest],
                [&](int tile) { return block_.Peer(tiles_.sums, tile / most_)[tile % most_]; });
    }
    WriteTiles();
    // Others read this block's shared memory up to here.
    block_.SyncCluster();
  }

 private:
  // The tiles of this warp. Each lane reads what it has stored.
  template <class Body>
  STRUCTKV_DEVICE void ForEachTile(const Body& body) const {
    STRUCTKV_ROLLED
    for (int i = block_.warp(); i < slice_.tiles; i += block_.warps()) {
      const uint32_t* keys = tiles_.keys[i].keys;
      body(i, [keys](int place) { return keys[place]; });
    }
  }

  STRUCTKV_DEVICE void TakeTiles() {
    constexpr int kStep = Block::kLanes;
    STRUCTKV_ROLLED
    for (int i = block_.warp(); i < slice_.tiles; i += block_.warps()) {
      const int tile = slice_.first_tile + i;
      const auto first = static_cast<uint32_t>(tile) * kTileTokens + block_.lane();
      const auto last = static_cast<uint32_t>(row_.tokens - 1);
      // Many are read before the first is used, as they come from far. Past the end the last is
      // read again.
      float scores[kTileTokens / kStep];
      STRUCTKV_UNROLL
      for (int k = 0; k < kTileTokens / kStep; ++k) {
        const uint32_t token = first + k * kStep;
        scores[k] = row_.scores[token < last ? token : last];
      }
      uint32_t* keys = tiles_.keys[i].keys;
      STRUCTKV_UNROLL
      for (int k = 0; k < kTileTokens / kStep; ++k) {
        keys[k * kStep + block_.lane()] = OrderedKey(scores[k]);
      }
      const int tokens = InTile(row_.tokens, tile);
      STRUCTKV_ROLLED
      for (int place = kTileTokens - kStep + block_.lane(); place >= tokens; place -= kStep) {
        keys[place] = kNoKey;
      }
      const SumsPart all = SumTile(block_, row_, tile);
      if (block_.lane() == 0) tiles_.sums[i].all = all;
    }
  }

  STRUCTKV_DEVICE void FindDigit(int digit) {
    Histogram& mine = shared_.histograms[digit];
    const Cut cuts[kQuestions] = {shared_.cuts[kBest], shared_.cuts[kLargest]};
    ForEachTile([&](int i, const auto& key_of) {
      CountTileDigit(block_, row_, slice_.first_tile + i, digit, cuts, key_of, mine);
    });
    block_.Sync();
    SumGroups(block_, digit, cuts, mine);
    block_.SyncCluster();
    // A warp for each question; a block of one warp has both.
    STRUCTKV_ROLLED
    for (int question = block_.warp(); question < kQuestions; question += block_.warps()) {
      const Cut next = NextCut(
          block_, shared_.cuts[question], digit,
          [&](int bin) { return SumOfBlocks(&mine.bins[question][bin]); },
          [&](int group) { return SumOfBlocks(&mine.groups[question][group]); });
      if (block_.lane() == 0) shared_.cuts[question] = next;
    }
    block_.Sync();
  }

  // Of a count that each block has.
  STRUCTKV_DEVICE uint32_t SumOfBlocks(const uint32_t* count) {
    // Unrolled, so that no read waits for another.
    uint32_t counts[kMaxClusterBlocks];
    STRUCTKV_UNROLL
    for (int r = 0; r < kMaxClusterBlocks; ++r) {
      counts[r] = r < block_.ranks() ? *block_.Peer(count, r) : 0;
    }
    uint32_t sum = 0;
    STRUCTKV_UNROLL
    for (const uint32_t each : counts) sum += each;
    return sum;
  }

  STRUCTKV_DEVICE void MeasureTiles() {
    const Cut cuts[kQuestions] = {shared_.cuts[kBest], shared_.cuts[kLargest]};
    ForEachTile([&](int i, const auto& key_of) {
      const TileResult result = MeasureTile(block_, row_, slice_.first_tile + i, cuts, key_of);
      if (block_.lane() == 0) {
        tiles_.counts[i] = result.count;
        tiles_.sums[i].top_mass = result.mass;
      }
    });
    block_.Sync();
    const TileCount total = ScanTiles(
        block_, slice_.tiles, [&](int i) { return tiles_.counts[i]; }, tiles_.counts,
        shared_.warp_counts);
    if (block_.thread() == 0) shared_.total = total;
    block_.SyncCluster();
  }

  STRUCTKV_DEVICE void WriteTiles() {
    // Lane l has block l's.
    TileCount before;
    if (block_.lane() < block_.rank()) before = *block_.Peer(&shared_.total, block_.lane());
    before = {block_.SumWarp(before.above), block_.SumWarp(before.equal)};
    const Cut cut = shared_.cuts[kBest];
    ForEachTile([&](int i, const auto& key_of) {
      WriteTile(block_, row_, slice_.first_tile + i, cut, Plus(before, tiles_.counts[i]),
                Plus(before, tiles_.counts[i + 1]), key_of);
    });
    WriteWindow(row_, block_.rank() * int64_t{block_.threads()} + block_.thread(),
                block_.ranks() * int64_t{block_.threads()});
  }

  Block& block_;
  const SelectRow& row_;
  const int most_;  // tiles of the first block, of which no other has more
  const Slice slice_;
  ClusterShared& shared_;
  ClusterTiles tiles_;
};

}  // namespace structkv::cuda
