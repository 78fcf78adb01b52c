#include "kernels/cuda/downloads.h"

#include <algorithm>
#include <cstring>

#include "kernels/cuda/tensor_runs.h"

namespace structkv::cuda {

void Downloads::Read(const void* from, int64_t bytes, void* to) {
  const auto* source = static_cast<const std::byte*>(from);
  auto* target = static_cast<std::byte*>(to);
  if (bytes >= kDirectBytes && IsPinned(to, bytes)) {
    Direct(source, bytes, target);
    return;
  }
  BySlices(source, bytes, [&target](int64_t most) {
    const Run run = {target, most};
    target += most;
    return run;
  });
}

void Downloads::ReadTensor(const void* from, const MutableTensorView& to, Layout layout) {
  const TensorView view = {to.data,         to.dtype,       to.heads,        to.tokens,
                           to.dim,          to.head_stride, to.token_stride, nullptr,
                           to.block_tokens, to.block_stride};
  TensorRuns runs(view, layout);
  // Runs that lie behind one another are one. They are those of a writable view.
  auto take = [&runs, ahead = runs.Next()]() mutable {
    Run run = {const_cast<std::byte*>(ahead.data), ahead.bytes};
    while ((ahead = runs.Next()).data != nullptr && ahead.data == run.to + run.bytes) {
      run.bytes += ahead.bytes;
    }
    return run;
  };
  const auto* source = static_cast<const std::byte*>(from);
  Run run = take();
  if (run.bytes >= kDirectBytes && LiesInPinned(view)) {
    for (; run.to != nullptr; run = take()) {
      Direct(source, run.bytes, run.to);
      source += run.bytes;
    }
    return;
  }
  BySlices(source, VectorBytes(to), [&](int64_t most) {
    if (run.bytes == 0) run = take();
    const Run part = {run.to, std::min(most, run.bytes)};
    run = {run.to + part.bytes, run.bytes - part.bytes};
    return part;
  });
}

void Downloads::Direct(const std::byte* from, int64_t bytes, std::byte* to) {
  if (status_.ok()) status_ = Copy(lease_, to, from, bytes, cudaMemcpyDeviceToHost);
}

void Downloads::BySlices(const std::byte* from, int64_t bytes, NextRun next) {
  Lane& lane = lease_.lane();
  while (bytes > 0 && status_.ok()) {
    if (used_ == lane.slice_bytes) Turn();
    if (used_ == 0) Deliver(lane.next);  // what came to it two turns ago
    if (!status_.ok()) return;
    std::byte* const staged = lane.slices[lane.next].bytes.get() + used_;
    const int64_t piece = std::min(bytes, lane.slice_bytes - used_);
    status_ = Copy(lease_, staged, from, piece, cudaMemcpyDeviceToHost);
    for (int64_t told = 0; told < piece;) {
      const Run run = next(piece - told);
      parts_[lane.next].push_back({staged + told, run.to, run.bytes});
      told += run.bytes;
    }
    from += piece;
    used_ += piece;
    bytes -= piece;
  }
}

void Downloads::Turn() {
  Lane& lane = lease_.lane();
  if (status_.ok()) status_ = Mark(lease_, lane.slices[lane.next]);
  lane.next = 1 - lane.next;
  used_ = 0;
}

void Downloads::Deliver(size_t slice) {
  if (parts_[slice].empty()) return;
  if (status_.ok()) status_ = WaitFor(lease_, lease_.lane().slices[slice]);
  for (const Part& part : parts_[slice]) {
    if (!status_.ok()) break;
    std::memcpy(part.to, part.from, static_cast<size_t>(part.bytes));
  }
  parts_[slice].clear();
}

absl::Status Downloads::Finish() {
  Lane& lane = lease_.lane();
  // The last mark comes after all copies, those that need no slice too.
  Turn();
  Deliver(lane.next);
  const size_t last = 1 - lane.next;
  if (status_.ok()) status_ = WaitFor(lease_, lane.slices[last]);
  Deliver(last);
  return status_;
}

absl::Status Download(const Lease& lease, const void* from, int64_t bytes, void* to) {
  Downloads downloads(lease);
  downloads.Read(from, bytes, to);
  return downloads.Finish();
}

}  // namespace structkv::cuda
