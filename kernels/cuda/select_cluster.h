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
  double* masses = nullptr;
  TileCount* counts = nullptr;
};

inline constexpr int64_t kClusterTileBytes =
    sizeof(ClusterTile) + sizeof(double) + sizeof(TileCount);
static_assert(sizeof(ClusterShared) % alignof(double) == 0);

STRUCTKV_HOST_DEVICE constexpr int64_t ClusterSharedBytes(int64_t tiles) {
  return static_cast<int64_t>(sizeof(ClusterShared)) + tiles * kClusterTileBytes;
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
        slice_(SliceOf(row.tokens, block.rank(), block.ranks())),
        shared_(*static_cast<ClusterShared*>(shared)) {
    const int64_t most = SliceOf(row.tokens, 0, block.ranks()).tiles;
    tiles_.masses = reinterpret_cast<double*>(&shared_ + 1);
    tiles_.counts = reinterpret_cast<TileCount*>(tiles_.masses + most);
    tiles_.keys = reinterpret_cast<ClusterTile*>(tiles_.counts + most);
  }

  STRUCTKV_DEVICE void Run() {
    for (Histogram& histogram : shared_.histograms) ClearHistogram(block_, histogram);
    if (block_.thread() < kQuestions) {
      shared_.cuts[block_.thread()] = FirstCut(row_, block_.thread());
    }
    LoadKeys();
    block_.Sync();
    for (int digit = 0; digit < kDigits; ++digit) FindDigit(digit);
    MeasureTiles();
    WriteTiles();
    if (block_.rank() == 0 && block_.warp() == 0) {
      const int64_t each = SliceOf(row_.tokens, 0, block_.ranks()).tiles;
      WriteSums(block_, row_, shared_.cuts[kLargest], [&](int64_t tile) {
        return block_.Peer(tiles_.masses, static_cast<int>(tile / each))[tile % each];
      });
    }
    // Others read this block's shared memory up to here.
    block_.SyncCluster();
  }

 private:
  // The tiles of this warp.
  template <class Body>
  STRUCTKV_DEVICE void ForEachTile(const Body& body) const {
    for (int64_t i = block_.warp(); i < slice_.tiles; i += block_.warps()) {
      const uint32_t* keys = tiles_.keys[i].keys;
      body(i, [keys](int place) { return keys[place]; });
    }
  }

  STRUCTKV_DEVICE void LoadKeys() {
    for (int64_t i = block_.warp(); i < slice_.tiles; i += block_.warps()) {
      const int64_t begin = (slice_.first_tile + i) * kTileTokens;
      STRUCTKV_UNROLL
      for (int step = 0; step < kTileTokens; step += Block::kLanes) {
        const int place = step + block_.lane();
        if (begin + place < row_.tokens) {
          tiles_.keys[i].keys[place] = OrderedKey(row_.scores[begin + place]);
        }
      }
    }
  }

  STRUCTKV_DEVICE void FindDigit(int digit) {
    Histogram& mine = shared_.histograms[digit];
    const Cut cuts[kQuestions] = {shared_.cuts[kBest], shared_.cuts[kLargest]};
    ForEachTile([&](int64_t i, const auto& key_of) {
      CountTileDigit(block_, row_, slice_.first_tile + i, digit, cuts, key_of, mine);
    });
    block_.Sync();
    SumGroups(block_, mine);
    block_.SyncCluster();
    // A warp for each question; a block of one warp has both.
    for (int question = block_.warp(); question < kQuestions; question += block_.warps()) {
      const auto count = [&](const auto& of) {
        // Unrolled, so that no read waits for another.
        uint32_t parts[kMaxClusterBlocks];
        STRUCTKV_UNROLL
        for (int r = 0; r < kMaxClusterBlocks; ++r) {
          parts[r] = 0;
          if (r >= block_.ranks()) continue;
          const Histogram& theirs = *block_.Peer(&mine, r);
          parts[r] = CountFor(question, digit, of(theirs, kBest), of(theirs, kLargest));
        }
        uint32_t sum = 0;
        STRUCTKV_UNROLL
        for (const uint32_t part : parts) sum += part;
        return sum;
      };
      const Cut next = NextCut(
          block_, shared_.cuts[question], digit,
          [&](int bin) {
            return count([bin](const Histogram& h, int q) { return h.bins[q][bin]; });
          },
          [&](int group) {
            return count([group](const Histogram& h, int q) { return h.groups[q][group]; });
          });
      if (block_.lane() == 0) shared_.cuts[question] = next;
    }
    block_.Sync();
  }

  STRUCTKV_DEVICE void MeasureTiles() {
    const Cut cuts[kQuestions] = {shared_.cuts[kBest], shared_.cuts[kLargest]};
    ForEachTile([&](int64_t i, const auto& key_of) {
      const TileResult result = MeasureTile(block_, row_, slice_.first_tile + i, cuts, key_of);
      if (block_.lane() == 0) {
        tiles_.counts[i] = result.count;
        tiles_.masses[i] = result.mass;
      }
    });
    block_.Sync();
    const TileCount total = ScanTiles(
        block_, slice_.tiles, [&](int64_t i) { return tiles_.counts[i]; }, tiles_.counts,
        shared_.warp_counts);
    if (block_.thread() == 0) shared_.total = total;
    block_.SyncCluster();
  }

  STRUCTKV_DEVICE void WriteTiles() {
    TileCount before;
    for (int r = 0; r < block_.rank(); ++r) {
      const TileCount& theirs = *block_.Peer(&shared_.total, r);
      before.above += theirs.above;
      before.equal += theirs.equal;
    }
    const Cut cut = shared_.cuts[kBest];
    ForEachTile([&](int64_t i, const auto& key_of) {
      const TileCount& in_slice = tiles_.counts[i];
      WriteTile(block_, row_, slice_.first_tile + i, cut,
                {before.above + in_slice.above, before.equal + in_slice.equal}, key_of);
    });
    WriteWindow(row_, block_.rank() * int64_t{block_.threads()} + block_.thread(),
                block_.ranks() * int64_t{block_.threads()});
  }

  Block& block_;
  const SelectRow& row_;
  const Slice slice_;
  ClusterShared& shared_;
  ClusterTiles tiles_;
};

}  // namespace structkv::cuda
