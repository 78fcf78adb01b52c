// The kernel that moves keys to other positions, over what a block of threads can do (DeviceBlock):
// rows pass through shared memory, and heads that keep the same ones share their angles.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/fused.h"
#include "kernels/cuda/gather_steps.h"

namespace structkv::cuda {

struct alignas(8) CosSin {
  float cosine;
  float sine;
};

// To what float32 can tell apart. The angle is reduced to a quarter turn in double precision, where
// the number of turns times the upper part of pi / 2 loses nothing.
STRUCTKV_HOST_DEVICE inline CosSin CosSinOf(double angle) {
  const double turns = rint(angle * 0.63661977236758134308);
  double rest = FusedMultiplyAdd(-turns, 1.57079632673412561417, angle);
  rest = FusedMultiplyAdd(-turns, 6.07710050650619224932e-11, rest);
  const auto r = static_cast<float>(rest);
  const float square = r * r;
  // Cephes' polynomials for |r| <= pi / 4, within a unit in the last place.
  float s = FusedMultiplyAdd(-1.9515295891e-4F, square, 8.3321608736e-3F);
  s = FusedMultiplyAdd(s, square, -1.6666654611e-1F);
  s = FusedMultiplyAdd(s * square, r, r);
  float c = FusedMultiplyAdd(2.443315711809948e-5F, square, -1.388731625493765e-3F);
  c = FusedMultiplyAdd(c, square, 4.166664568298827e-2F);
  c = FusedMultiplyAdd(c, square, -0.5F);
  c = FusedMultiplyAdd(c, square, 1.0F);
  const auto quarter = static_cast<int>(turns - 4.0 * floor(0.25 * turns));
  const float x = quarter % 2 == 0 ? c : s;
  const float y = quarter % 2 == 0 ? s : c;
  return {quarter == 1 || quarter == 2 ? -x : x, quarter >= 2 ? -y : y};
}

// A block's shared memory.
struct RotateShared {
  alignas(16) unsigned char stage[kStageBytes];  // [heads, rows, row_bytes]
  CosSin angles[kStageAngles];                   // [rows, pairs]
  RowPlaces places;
  int32_t stood[kGatherRows];
};

// Whether no frequency changes, for all threads of a warp.
template <class Block>
STRUCTKV_DEVICE bool SameFrequencies(Block& block, const RotatePlan& plan) {
  bool differ = false;
  for (int j = block.lane(); j < plan.pairs; j += Block::kLanes) {
    differ = differ || plan.from[j] != plan.to[j];
  }
  return block.Ballot(differ) == 0;
}

// The angles of the rows that move.
template <class Block>
STRUCTKV_DEVICE void FillAngles(Block& block, const RotatePlan& plan, const GatherTile& tile,
                                bool same, RotateShared& shared) {
  Cursor at(block.thread(), block.threads(), plan.pairs);
  STRUCTKV_ROLLED
  for (; at.row() < tile.rows; at.Next()) {
    const int64_t position = plan.first_position + tile.first_row + at.row();
    const int64_t stood = shared.stood[at.row()];
    if (same && position == stood) continue;
    const int pair = at.column();
    const float to = MultiplyRounded(plan.to[pair], static_cast<float>(position));
    const float from = MultiplyRounded(plan.from[pair], static_cast<float>(stood));
    shared.angles[at.row() * plan.pairs + pair] =
        CosSinOf(static_cast<double>(to) - static_cast<double>(from));
  }
}

// Rotates the rows that move where they lie in shared memory.
template <DType kType, class Block>
STRUCTKV_DEVICE void RotateStage(Block& block, const RotatePlan& plan, const GatherTile& tile,
                                 bool same, RotateShared& shared) {
  using Element = std::conditional_t<kType == DType::kF32, uint32_t, uint16_t>;
  const bool halves = plan.pairing == RotaryPairing::kHalfSplit;
  Cursor at(block.thread(), block.threads(), plan.pairs);
  STRUCTKV_ROLLED
  for (; at.row() < tile.rows; at.Next()) {
    const int row = at.row();
    if (same && plan.first_position + tile.first_row + row == shared.stood[row]) continue;
    const CosSin angle = shared.angles[row * plan.pairs + at.column()];
    const int first = halves ? at.column() : 2 * at.column();
    const int second = halves ? first + plan.pairs : first + 1;
    STRUCTKV_ROLLED
    for (int i = row; i < tile.rows * tile.heads; i += tile.rows) {
      auto* const part =
          reinterpret_cast<Element*>(shared.stage + i * plan.row_bytes + plan.rotated_bytes);
      const float x = FromBits<kType>(part[first]);
      const float y = FromBits<kType>(part[second]);
      part[first] =
          static_cast<Element>(ToBits<kType>(FusedMultiplyAdd(-y, angle.sine, x * angle.cosine)));
      part[second] =
          static_cast<Element>(ToBits<kType>(FusedMultiplyAdd(x, angle.sine, y * angle.cosine)));
    }
  }
}

template <class Block>
STRUCTKV_DEVICE void RotateStage(Block& block, const RotatePlan& plan, const GatherTile& tile,
                                 bool same, RotateShared& shared) {
  switch (plan.dtype) {
    case DType::kF16:
      return RotateStage<DType::kF16>(block, plan, tile, same, shared);
    case DType::kBF16:
      return RotateStage<DType::kBF16>(block, plan, tile, same, shared);
    default:
      return RotateStage<DType::kF32>(block, plan, tile, same, shared);
  }
}

// One block moves one tile of the launch.
template <class Block>
STRUCTKV_DEVICE void RotateTile(Block& block, const RotateLaunch& launch, RotateShared& shared) {
  const RotatePlan& plan = JobOf(launch, block.index());
  const GatherTile tile = TileOf(plan, block.index());
  const int32_t* const stood = OfRows(plan.stood, plan, tile);
  for (int r = block.thread(); r < tile.rows; r += block.threads()) shared.stood[r] = stood[r];
  FindRows(block, plan, tile, shared.places);
  const bool same = SameFrequencies(block, plan);
  if (plan.pairs > 0) FillAngles(block, plan, tile, same, shared);
  const int rows = tile.rows * tile.heads;
  WithWidth(plan.width, [&](auto vector) {
    using Vector = decltype(vector);
    MoveVectors<Vector>(
        FirstVector(block, plan), rows,
        [&](int row, int column) {
          return block.Once(reinterpret_cast<const Vector*>(shared.places.from[row]) + column);
        },
        [&](int row, int column, const Vector& v) {
          reinterpret_cast<Vector*>(shared.stage + row * plan.row_bytes)[column] = v;
        });
  });
  block.Sync();
  if (plan.pairs > 0) RotateStage(block, plan, tile, same, shared);
  block.Sync();
  WithWidth(plan.width, [&](auto vector) {
    using Vector = decltype(vector);
    MoveVectors<Vector>(
        FirstVector(block, plan), rows,
        [&](int row, int column) {
          return reinterpret_cast<const Vector*>(shared.stage + row * plan.row_bytes)[column];
        },
        [&](int row, int column, const Vector& v) {
          reinterpret_cast<Vector*>(shared.places.to[row])[column] = v;
        });
  });
}

}  // namespace structkv::cuda
