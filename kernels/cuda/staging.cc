#include "kernels/cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "kernels/cuda/tensor_runs.h"

namespace structkv::cuda {
absl::Status WaitFor(const Lease& lease) {
  return lease.device().Check(cudaStreamSynchronize(lease.stream()), "cudaStreamSynchronize");
}

absl::Status WaitFor(const Lease& lease, PinnedSlice& slice) {
  if (!slice.in_flight) return absl::OkStatus();
  slice.in_flight = false;
  return lease.device().Check(cudaEventSynchronize(slice.copied.get()), "cudaEventSynchronize");
}

absl::Status Mark(const Lease& lease, PinnedSlice& slice) {
  slice.in_flight = true;
  return lease.device().Check(cudaEventRecord(slice.copied.get(), lease.stream()),
                              "cudaEventRecord");
}

absl::Status Copy(const Lease& lease, void* to, const void* from, int64_t bytes,
                  cudaMemcpyKind kind) {
  return lease.device().Check(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, lease.stream()),
      "cudaMemcpyAsync");
}

void Upload::WriteBytes(void* to, const void* from, int64_t bytes, bool direct) {
  if (direct) {
    Send();
    to_ = static_cast<std::byte*>(to);
    if (status_.ok()) status_ = Copy(lease_, to, from, bytes, cudaMemcpyDefault);
    return;
  }
  Fill(to, bytes, [from](int64_t offset, absl::Span<std::byte> run) {
    std::memcpy(run.data(), static_cast<const std::byte*>(from) + offset, run.size());
  });
}

void Upload::Fill(void* to, int64_t bytes, FillRun fill) {
  auto* target = static_cast<std::byte*>(to);
  if (target != to_ + (end_ - begin_)) {
    Send();
    to_ = target;
  }
  for (int64_t filled = 0; filled < bytes;) {
    if (end_ == lease_.lane().slice_bytes) Turn();
    if (end_ == 0 && status_.ok()) status_ = WaitFor(lease_, slice());
    if (!status_.ok()) return;
    const int64_t piece = std::min(bytes - filled, lease_.lane().slice_bytes - end_);
    fill(filled, {slice().bytes.get() + end_, static_cast<size_t>(piece)});
    end_ += piece;
    filled += piece;
  }
}

void Upload::WriteTensor(void* to, const TensorView& from, Layout layout) {
  Place place;
  status_.Update(lease_.device().Check(PlaceOf(from.data, &place), "cudaPointerGetAttributes"));
  if (!status_.ok()) return;
  auto* target = static_cast<std::byte*>(to);
  TensorRuns runs(from, layout);
  for (Run run = runs.Next(); run.data != nullptr; run = runs.Next()) {
    const bool direct = place.on_device() || (place.pinned && run.bytes >= kDirectBytes &&
                                              IsPinned(run.data, run.bytes));
    WriteBytes(target, run.data, run.bytes, direct);
    target += run.bytes;
  }
}

void Upload::Send() {
  if (end_ == begin_ || !status_.ok()) return;
  const int64_t bytes = end_ - begin_;
  status_ = Copy(lease_, to_, slice().bytes.get() + begin_, bytes, cudaMemcpyHostToDevice);
  begin_ = end_;
  to_ += bytes;
}

void Upload::Turn() {
  Send();
  if (end_ == 0 || !status_.ok()) return;
  status_ = Mark(lease_, slice());
  lease_.lane().next = 1 - lease_.lane().next;
  begin_ = end_ = 0;
}

absl::Status Upload::Flush() {
  Turn();
  return status_;
}

bool LiesInPinned(const TensorView& view) {
  if (view.paged() && view.block_table != nullptr) return false;
  const std::byte* const begin = view.Row(0, 0);
  const std::byte* const end = view.Row(view.heads - 1, view.tokens - 1) +
                               view.dim * static_cast<int64_t>(DTypeSize(view.dtype));
  return IsPinned(begin, end - begin);
}

}  // namespace structkv::cuda
