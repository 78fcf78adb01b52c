// How jobs of rows to be copied or moved are cut into tiles, one for each block of a launch; a
// function of shapes, strides and alignment alone.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/cuda/host_device.h"
#include "kernels/rotation.h"
#include "kernels/tensor.h"

namespace structkv::cuda {

// Rows of one tensor. All pointers, the block table's included, are unified addresses: device
// memory, or host memory that is pinned and mapped. Rows are copied as fast as alignment lets them:
// 16 bytes at a time where data, strides and rows are multiples of 16 on both sides, else 8, 4, 2
// or 1.
struct GatherJob {
  // [heads, tokens, dim], any element type, dense or paged; not null. At most 2^31 - 1 tokens.
  TensorView source;
  // [kept], or [heads, kept] where `per_head`; not null; each in the source.
  const int32_t* positions = nullptr;
  bool per_head = false;
  // [heads, kept, dim], the source's heads, dim and dtype, dense or paged; not null, may not
  // overlap what is read. Nothing kept: the job is passed over. What lies behind the last token in
  // a last block is not written.
  MutableTensorView destination;
};

// Keys of F32, F16 or BF16, rows of at most kStageBytes, that are moved to other positions
// (kernels/rotation.h). `rotation` points to unified addresses as the job does; its positions are
// shaped as the job's.
struct GatherRotatedJob {
  GatherJob rows;
  RotationParams rotation;
};

inline constexpr int kGatherThreads = 256;
inline constexpr int kGatherLoads = 4;   // of a thread, in flight
inline constexpr int kGatherRows = 256;  // of a tile, at most
// What a tile of rows that move has room for in shared memory, and heads that share its angles.
inline constexpr int kStageBytes = 8192;
inline constexpr int kStageAngles = 2048;
inline constexpr int kRotatedHeads = 4;

// A job as the kernels see it; strides in bytes.
struct GatherPlan {
  const unsigned char* source;
  const int32_t* block_table;
  const int32_t* positions;
  unsigned char* destination;
  int64_t source_head_stride;
  int64_t source_token_stride;
  int64_t source_block_stride;
  int64_t head_stride;  // the destination's
  int64_t token_stride;
  int64_t block_stride;
  int source_block_tokens;  // 0: dense
  int block_tokens;
  int heads;
  int kept;
  int position_heads;  // 1: the same rows of all heads
  int row_bytes;
  int width;       // bytes that are copied at once
  int tile_rows;   // of a tile and each of its heads
  int tile_heads;  // of a tile; times tile_rows at most kGatherRows
  int first_tile;  // of the launch

  STRUCTKV_HOST_DEVICE int head_groups() const { return (heads + tile_heads - 1) / tile_heads; }
};

// A job whose keys move.
struct RotatePlan : GatherPlan {
  const float* from;
  const float* to;
  const int32_t* stood;  // the positions that the keys were rotated for
  int64_t first_position;
  int rotated_bytes;  // before the part that rotates
  int pairs;
  RotaryPairing pairing;
  DType dtype;
};

// The jobs of one launch, held in a kernel's parameters.
template <class Plan, int kMost>
struct GatherLaunch {
  static constexpr int kJobs = kMost;

  Plan job[kMost];
  int jobs;
  int tiles;
};
using CopyLaunch = GatherLaunch<GatherPlan, 32>;
using RotateLaunch = GatherLaunch<RotatePlan, 24>;
inline constexpr int kParameterBytes = 4096;
static_assert(sizeof(CopyLaunch) <= kParameterBytes && sizeof(RotateLaunch) <= kParameterBytes);

inline constexpr int64_t kMaxRowBytes = int64_t{1} << 30;

inline bool IsValid(const GatherJob& job) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const TensorView& from = job.source;
  const MutableTensorView& to = job.destination;
  if (to.tokens == 0) return true;
  return from.data != nullptr && job.positions != nullptr && to.data != nullptr &&
         from.dtype <= DType::kF8E5M2 && to.dtype == from.dtype && from.heads >= 1 &&
         from.heads <= kMost && to.heads == from.heads && from.dim >= 1 &&
         from.dim <= kMaxRowBytes / 4 && to.dim == from.dim && from.tokens >= 1 &&
         from.tokens <= kMost && to.tokens >= 1 && to.tokens <= kMost && from.block_tokens >= 0 &&
         to.block_tokens >= 0;
}

inline bool IsValid(const GatherRotatedJob& job) {
  const TensorView& from = job.rows.source;
  const RotationParams& r = job.rotation;
  if (!IsValid(job.rows)) return false;
  if (job.rows.destination.tokens == 0) return true;
  return !IsFp8(from.dtype) &&
         from.dim <= kStageBytes / static_cast<int64_t>(DTypeSize(from.dtype)) &&
         r.pairing <= RotaryPairing::kInterleaved && r.offset >= 0 && r.pairs >= 0 &&
         r.offset <= from.dim && r.pairs <= (from.dim - r.offset) / 2 && r.positions != nullptr &&
         (r.pairs == 0 || (r.from != nullptr && r.to != nullptr));
}

// The most bytes, a power of two up to 16, that all of a plan's addresses are multiples of.
inline int WidthOf(const GatherPlan& plan) {
  const auto address = [](const void* p) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p));
  };
  int64_t all = 16 | address(plan.source) | address(plan.destination) | plan.row_bytes;
  all |= plan.source_head_stride | plan.source_token_stride | plan.head_stride | plan.token_stride;
  if (plan.source_block_tokens != 0) all |= plan.source_block_stride;
  if (plan.block_tokens != 0) all |= plan.block_stride;
  return static_cast<int>(all & -all);
}

// The plan of a valid job, but for its tiles.
inline GatherPlan UntiledPlan(const GatherJob& job) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto element = static_cast<int64_t>(DTypeSize(job.source.dtype));
  const auto block = [](int64_t tokens) {
    return static_cast<int>(tokens < kMost ? tokens : kMost);
  };
  GatherPlan plan = {};
  plan.source = static_cast<const unsigned char*>(job.source.data);
  plan.block_table = job.source.block_table;
  plan.positions = job.positions;
  plan.destination = static_cast<unsigned char*>(job.destination.data);
  plan.source_head_stride = job.source.head_stride * element;
  plan.source_token_stride = job.source.token_stride * element;
  plan.source_block_stride = job.source.block_stride * element;
  plan.head_stride = job.destination.head_stride * element;
  plan.token_stride = job.destination.token_stride * element;
  plan.block_stride = job.destination.block_stride * element;
  plan.source_block_tokens = block(job.source.block_tokens);
  plan.block_tokens = block(job.destination.block_tokens);
  plan.heads = static_cast<int>(job.source.heads);
  plan.kept = static_cast<int>(job.destination.tokens);
  plan.position_heads = job.per_head ? plan.heads : 1;
  plan.row_bytes = static_cast<int>(job.source.dim * element);
  return plan;
}

inline int AtMost(int64_t value, int most) { return static_cast<int>(value < most ? value : most); }

// A tile is what the threads of a block have in flight, or a row of one head that is longer.
inline GatherPlan PlanOf(const GatherJob& job) {
  GatherPlan plan = UntiledPlan(job);
  const int64_t side_by_side = int64_t{plan.heads} * plan.row_bytes;
  if (plan.position_heads == 1 && plan.source_head_stride == plan.row_bytes &&
      plan.head_stride == plan.row_bytes && side_by_side <= kMaxRowBytes) {
    // A token's heads lie side by side in both: they are one row.
    plan.row_bytes = static_cast<int>(side_by_side);
    plan.heads = 1;
  }
  plan.width = WidthOf(plan);
  plan.tile_heads = 1;
  const int64_t rows = int64_t{kGatherThreads} * kGatherLoads * plan.width / plan.row_bytes;
  plan.tile_rows = rows < 1 ? 1 : AtMost(rows, kGatherRows);
  return plan;
}

// A tile is what shared memory has room for.
inline RotatePlan PlanOf(const GatherRotatedJob& job) {
  const RotationParams& r = job.rotation;
  RotatePlan plan = {};
  static_cast<GatherPlan&>(plan) = UntiledPlan(job.rows);
  plan.width = WidthOf(plan);
  const int room = kStageBytes / plan.row_bytes;
  plan.tile_heads = plan.position_heads == 1 ? AtMost(plan.heads, AtMost(room, kRotatedHeads)) : 1;
  plan.tile_rows = AtMost(room, kGatherRows) / plan.tile_heads;
  if (r.pairs > 0) plan.tile_rows = AtMost(kStageAngles / r.pairs, plan.tile_rows);
  plan.from = r.from;
  plan.to = r.to;
  plan.stood = r.positions;
  plan.first_position = r.first_position;
  plan.rotated_bytes =
      static_cast<int>(r.offset * static_cast<int64_t>(DTypeSize(job.rows.source.dtype)));
  plan.pairs = static_cast<int>(r.pairs);
  plan.pairing = r.pairing;
  plan.dtype = job.rows.source.dtype;
  return plan;
}
static_assert(kStageAngles >= kStageBytes / 2 / 2, "the pairs of a longest row");

// Tiles of a plan.
inline int64_t TilesOf(const GatherPlan& plan) {
  return (int64_t{plan.kept} + plan.tile_rows - 1) / plan.tile_rows * plan.head_groups();
}
inline constexpr int64_t kMaxTiles = std::numeric_limits<int32_t>::max();  // blocks of a grid

// What of a job is copied.
inline const GatherJob& CopyOf(const GatherJob& job) { return job; }
inline const GatherJob& CopyOf(const GatherRotatedJob& job) { return job.rows; }

// Whether a job keeps any rows.
template <class Job>
bool KeepsAny(const Job& job) {
  return CopyOf(job).destination.tokens > 0;
}

// Makes a launch of the first of valid jobs, of which each has kMaxTiles at most; returns how many.
// Those that keep nothing have no part in it.
template <class Launch, class Job>
int64_t FillLaunch(const Job* jobs, int64_t count, Launch* launch) {
  launch->jobs = 0;
  launch->tiles = 0;
  int64_t taken = 0;
  for (; taken < count && launch->jobs < Launch::kJobs; ++taken) {
    if (!KeepsAny(jobs[taken])) continue;
    auto plan = PlanOf(jobs[taken]);
    const int64_t tiles = TilesOf(plan);
    if (tiles > kMaxTiles - launch->tiles) break;
    plan.first_tile = launch->tiles;
    launch->tiles += static_cast<int>(tiles);
    launch->job[launch->jobs++] = plan;
  }
  return taken;
}

}  // namespace structkv::cuda
