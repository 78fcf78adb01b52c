// The kernel that copies rows, over what a block of threads can do (DeviceBlock).
#pragma once

#include <cstdint>

#include "kernels/cuda/gather_plan.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/token_offset.h"

namespace structkv::cuda {

// Where a tile's rows lie, head after head.
struct RowPlaces {
  const unsigned char* from[kGatherRows];
  unsigned char* to[kGatherRows];
};

// Some rows of some heads of a job.
struct GatherTile {
  int first_row;
  int rows;
  int first_head;
  int heads;
};

// The job of a launch that a block has a tile of.
template <class Launch>
STRUCTKV_DEVICE const auto& JobOf(const Launch& launch, int64_t tile) {
  int job = launch.jobs - 1;
  while (launch.job[job].first_tile > tile) --job;
  return launch.job[job];
}

// Heads come first: those of a token may lie side by side.
STRUCTKV_HOST_DEVICE inline GatherTile TileOf(const GatherPlan& plan, int64_t tile) {
  const int groups = plan.head_groups();
  const int in_job = static_cast<int>(tile - plan.first_tile);
  const int row = in_job / groups * plan.tile_rows;
  const int head = in_job % groups * plan.tile_heads;
  return {row, plan.kept - row < plan.tile_rows ? plan.kept - row : plan.tile_rows, head,
          plan.heads - head < plan.tile_heads ? plan.heads - head : plan.tile_heads};
}

// What a job has one of for each row, from the first row of a tile on, for its head.
STRUCTKV_HOST_DEVICE inline const int32_t* OfRows(const int32_t* all, const GatherPlan& plan,
                                                  const GatherTile& tile) {
  const int64_t set = plan.position_heads == 1 ? 0 : tile.first_head;
  return all + set * plan.kept + tile.first_row;
}

// Finds the places of a tile's rows. Ends with a barrier.
template <class Block>
STRUCTKV_DEVICE void FindRows(Block& block, const GatherPlan& plan, const GatherTile& tile,
                              RowPlaces& places) {
  const int32_t* const positions = OfRows(plan.positions, plan, tile);
  for (int i = block.thread(); i < tile.rows * tile.heads; i += block.threads()) {
    const int64_t head = tile.first_head + i / tile.rows;
    const int row = i % tile.rows;
    places.from[i] = plan.source + head * plan.source_head_stride +
                     TokenOffset(positions[row], plan.source_token_stride, plan.source_block_tokens,
                                 plan.source_block_stride, plan.block_table);
    places.to[i] = plan.destination + head * plan.head_stride +
                   TokenOffset(tile.first_row + row, plan.token_stride, plan.block_tokens,
                               plan.block_stride, nullptr);
  }
  block.Sync();
}

// A place in rows of `columns`, row after row, that goes on by the threads of a block.
class Cursor {
 public:
  STRUCTKV_DEVICE Cursor(int index, int step, int columns)
      : columns_(columns),
        row_step_(step / columns),
        column_step_(step % columns),
        row_(index / columns),
        column_(index % columns) {}

  STRUCTKV_DEVICE int row() const { return row_; }
  STRUCTKV_DEVICE int column() const { return column_; }
  STRUCTKV_DEVICE void Next() {
    row_ += row_step_;
    column_ += column_step_;
    if (column_ >= columns_) {
      column_ -= columns_;
      ++row_;
    }
  }

 private:
  const int columns_;
  const int row_step_;
  const int column_step_;
  int row_;
  int column_;
};

// Where a thread begins with the vectors of a tile's rows.
template <class Block>
STRUCTKV_DEVICE Cursor FirstVector(Block& block, const GatherPlan& plan) {
  return {block.thread(), block.threads(), plan.row_bytes / plan.width};
}

// Moves all of `rows` rows by vectors, of which a thread has several in flight: store(row, column,
// load(row, column)).
template <class Vector, class Load, class Store>
STRUCTKV_DEVICE void MoveVectors(Cursor from, int rows, const Load& load, const Store& store) {
  Cursor to = from;
  STRUCTKV_ROLLED
  while (from.row() < rows) {
    Vector vectors[kGatherLoads];
    STRUCTKV_UNROLL
    for (int i = 0; i < kGatherLoads; ++i) {
      if (from.row() < rows) vectors[i] = load(from.row(), from.column());
      from.Next();
    }
    STRUCTKV_UNROLL
    for (int i = 0; i < kGatherLoads; ++i) {
      if (to.row() < rows) store(to.row(), to.column(), vectors[i]);
      to.Next();
    }
  }
}

// Calls `body` with a vector of `width` bytes.
template <class Body>
STRUCTKV_DEVICE void WithWidth(int width, const Body& body) {
  switch (width) {
    case 16:
      return body(Words4());
    case 8:
      return body(Words2());
    case 4:
      return body(uint32_t());
    case 2:
      return body(uint16_t());
    default:
      return body(uint8_t());
  }
}

// One block copies one tile of the launch.
template <class Block>
STRUCTKV_DEVICE void CopyTile(Block& block, const CopyLaunch& launch, RowPlaces& places) {
  const GatherPlan& plan = JobOf(launch, block.index());
  const GatherTile tile = TileOf(plan, block.index());
  FindRows(block, plan, tile, places);
  WithWidth(plan.width, [&](auto vector) {
    using Vector = decltype(vector);
    MoveVectors<Vector>(
        FirstVector(block, plan), tile.rows * tile.heads,
        [&](int row, int column) {
          return block.Once(reinterpret_cast<const Vector*>(places.from[row]) + column);
        },
        [&](int row, int column, const Vector& v) {
          reinterpret_cast<Vector*>(places.to[row])[column] = v;
        });
  });
}

}  // namespace structkv::cuda
