#include "kernels/cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "absl/functional/function_ref.h"
#include "kernels/cuda/tensor_runs.h"

namespace structkv::cuda {
namespace {

// Waits until nothing is copied from or to the slice.
absl::Status WaitFor(const Lease& lease, PinnedSlice& slice) {
  if (!slice.in_flight) return absl::OkStatus();
  slice.in_flight = false;
  return lease.device().Check(cudaEventSynchronize(slice.copied.get()), "cudaEventSynchronize");
}

// Marks the slice's last copy.
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

// Hands `take` the bytes in pieces, in their order; the next piece is on its way meanwhile.
absl::Status DownloadPieces(const Lease& lease, const std::byte* from, int64_t bytes,
                            absl::FunctionRef<void(const std::byte*, int64_t)> take) {
  Lane& lane = lease.lane();
  int64_t asked = 0;
  const auto ask = [&](PinnedSlice& slice) {
    absl::Status status = WaitFor(lease, slice);
    if (!status.ok()) return status;
    const int64_t piece = std::min(lane.slice_bytes, bytes - asked);
    status = Copy(lease, slice.bytes.get(), from + asked, piece, cudaMemcpyDeviceToHost);
    if (!status.ok()) return status;
    asked += piece;
    return Mark(lease, slice);
  };
  absl::Status status = ask(lane.slices[lane.next]);
  for (int64_t taken = 0; status.ok() && taken < bytes;) {
    PinnedSlice& slice = lane.slices[lane.next];
    lane.next = 1 - lane.next;
    if (asked < bytes) status = ask(lane.slices[lane.next]);
    if (status.ok()) status = WaitFor(lease, slice);
    if (!status.ok()) break;
    const int64_t piece = std::min(lane.slice_bytes, bytes - taken);
    take(slice.bytes.get(), piece);
    taken += piece;
  }
  return status;
}

}  // namespace

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

absl::Status WaitFor(const Lease& lease) {
  return lease.device().Check(cudaStreamSynchronize(lease.stream()), "cudaStreamSynchronize");
}

absl::Status Download(const Lease& lease, const void* from, int64_t bytes, void* to) {
  if (bytes >= kDirectBytes && IsPinned(to, bytes)) {
    PinnedSlice& slice = lease.lane().slices[lease.lane().next];
    absl::Status status = Copy(lease, to, from, bytes, cudaMemcpyDeviceToHost);
    if (status.ok()) status = Mark(lease, slice);
    return status.ok() ? WaitFor(lease, slice) : status;
  }
  auto* target = static_cast<std::byte*>(to);
  return DownloadPieces(lease, static_cast<const std::byte*>(from), bytes,
                        [&target](const std::byte* piece, int64_t size) {
                          std::memcpy(target, piece, static_cast<size_t>(size));
                          target += size;
                        });
}

absl::Status DownloadTensor(const Lease& lease, const void* from, const MutableTensorView& to,
                            Layout layout) {
  const TensorView view = {to.data,         to.dtype,       to.heads,        to.tokens,
                           to.dim,          to.head_stride, to.token_stride, nullptr,
                           to.block_tokens, to.block_stride};
  const int64_t bytes = VectorBytes(to);
  TensorRuns runs(view, layout);
  // Runs that lie behind one another are one.
  auto next = [&runs, ahead = runs.Next()]() mutable {
    Run run = ahead;
    while ((ahead = runs.Next()).data != nullptr && ahead.data == run.data + run.bytes) {
      run.bytes += ahead.bytes;
    }
    return run;
  };
  Run run = next();
  if (run.bytes >= kDirectBytes && LiesInPinned(view)) {
    const auto* at = static_cast<const std::byte*>(from);
    absl::Status status;
    for (; status.ok() && run.data != nullptr; run = next()) {
      // The runs are those of a writable view.
      status = Copy(lease, const_cast<std::byte*>(run.data), at, run.bytes, cudaMemcpyDeviceToHost);
      at += run.bytes;
    }
    return status;
  }
  return DownloadPieces(
      lease, static_cast<const std::byte*>(from), bytes, [&](const std::byte* piece, int64_t size) {
        while (size > 0) {
          if (run.bytes == 0) run = next();
          const int64_t part = std::min(size, run.bytes);
          // The runs are those of a writable view.
          std::memcpy(const_cast<std::byte*>(run.data), piece, static_cast<size_t>(part));
          run.data += part;
          run.bytes -= part;
          piece += part;
          size -= part;
        }
      });
}

}  // namespace structkv::cuda
