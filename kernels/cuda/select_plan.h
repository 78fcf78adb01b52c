// How the rows of a selection are divided among launches.
#pragma once

#include <cstdint>

#include "kernels/cuda/select_cluster.h"
#include "kernels/cuda/select_global.h"

namespace structkv::cuda {

// What of a device matters here.
struct SelectLimits {
  int cluster_blocks = 1;           // a power of two; 1: the chip has no clusters
  int64_t shared_bytes = 48 << 10;  // that a block can have
  int multiprocessors = 1;
};

inline constexpr int64_t kMaxTokens = 0x7FFFFFFF;
// As many as a kernel's parameters have room for.
inline constexpr int kSelectRows = 48;

constexpr bool IsValid(const SelectRow& row) {
  if (row.scores == nullptr || row.tokens < 1 || row.tokens > kMaxTokens) return false;
  if (row.positions != nullptr &&
      (row.window < 0 || row.keep < row.window || row.keep > row.tokens)) {
    return false;
  }
  return row.sums == nullptr || (row.top_count >= 0 && row.top_count <= row.tokens);
}

// Tiles that a block's shared memory has room for.
constexpr int64_t ClusterRoom(const SelectLimits& limits) {
  const int64_t room = (limits.shared_bytes - ClusterSharedBytes(0)) / kClusterTileBytes;
  return room > 0 ? room : 0;
}

// Blocks of the cluster that takes a row, 0: it goes through device memory.
constexpr int ClusterBlocks(const SelectRow& row, const SelectLimits& limits) {
  return ClusterBlocks(Tiles(row.tokens), ClusterRoom(limits), limits.cluster_blocks);
}

// Consecutive rows of one way that one launch takes.
struct SelectRun {
  int64_t rows = 0;
  int64_t tokens = 0;       // of the longest
  int64_t state_bytes = 0;  // of all, in device memory
  int cluster_blocks = 0;   // 0: through device memory
};

// The run that begins at rows[0]; `count` is 1 or more.
constexpr SelectRun NextRun(const SelectRow* rows, int64_t count, const SelectLimits& limits) {
  SelectRun run;
  const bool in_cluster = ClusterBlocks(rows[0], limits) != 0;
  while (run.rows < count && run.rows < kSelectRows) {
    const SelectRow& row = rows[run.rows];
    if ((ClusterBlocks(row, limits) != 0) != in_cluster) break;
    if (row.tokens > run.tokens) run.tokens = row.tokens;
    if (!in_cluster) run.state_bytes += GlobalStateBytes(row.tokens);
    ++run.rows;
  }
  if (in_cluster) {
    run.cluster_blocks =
        ClusterBlocks(Tiles(run.tokens), ClusterRoom(limits), limits.cluster_blocks);
  }
  return run;
}

// Bytes of scratch memory that the rows need, 0 where all fit into clusters.
constexpr int64_t SelectScratchBytes(const SelectRow* rows, int64_t row_count,
                                     const SelectLimits& limits) {
  int64_t bytes = 0;
  // Runs follow each other on the stream and use the same memory.
  for (int64_t r = 0; r < row_count;) {
    const SelectRun run = NextRun(rows + r, row_count - r, limits);
    if (run.state_bytes > bytes) bytes = run.state_bytes;
    r += run.rows;
  }
  return bytes;
}

}  // namespace structkv::cuda
