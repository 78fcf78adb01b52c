#include "kernels/cuda/gather_call.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/downloads.h"
#include "kernels/cuda/gather.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/tensor_runs.h"

namespace structkv::cuda {
namespace {

class GatherCall {
 public:
  // `from` and `to`: where the source and the destination lie.
  GatherCall(const TensorView& source, const Place& from, const int32_t* rows, bool per_head,
             const RotationParams* rotation, const MutableTensorView& destination, const Place& to)
      : source_(source),
        rows_(rows),
        per_head_(per_head),
        rotation_(rotation),
        destination_(destination),
        device_(std::max(from.device, to.device)),
        in_place_(from.on_device() || LiesInPinned(source)),
        writes_in_place_(to.on_device()) {
    kept_ = TensorView::Dense(nullptr, source.dtype, Layout::kHeadTokenDim, source.heads,
                              destination.tokens, source.dim);
    packed_at_ = parts_.Add<std::byte>(in_place_ ? 0 : VectorBytes(kept_));
    rows_at_ = parts_.Add<int32_t>(Rows());
    out_at_ = parts_.Add<std::byte>(writes_in_place_ ? 0 : VectorBytes(kept_));
    table_at_ = parts_.Add<int32_t>(in_place_ ? TableBlocks(source) : 0);
    if (rotation == nullptr) return;
    stood_at_ = parts_.Add<int32_t>(Rows());
    from_at_ = parts_.Add<float>(rotation->pairs);
    to_at_ = parts_.Add<float>(rotation->pairs);
  }

  absl::Status Run(Devices& devices) {
    absl::StatusOr<Lease> lease = devices.AcquireOn(device_, parts_.bytes());
    if (!lease.ok()) return lease.status();
    absl::Status status = Prepare(*lease);
    if (status.ok()) status = Launch(*lease);
    if (!status.ok()) return status;
    Downloads downloads(*lease);
    if (!writes_in_place_) {
      downloads.ReadTensor(lease->At<void>(out_at_), destination_, layout());
    }
    return downloads.Finish();
  }

 private:
  int64_t Rows() const { return (per_head_ ? source_.heads : 1) * destination_.tokens; }
  Layout layout() const { return LayoutOf(destination_); }

  absl::Status Prepare(const Lease& lease) const {
    Upload upload(lease);
    if (in_place_) {
      upload.Write(lease.At<int32_t>(rows_at_), rows_, Rows());
      upload.Write(lease.At<int32_t>(table_at_), source_.block_table, TableBlocks(source_));
    } else {
      Pack(lease, &upload);
    }
    if (rotation_ != nullptr) {
      upload.Write(lease.At<int32_t>(stood_at_), rotation_->positions, Rows());
      upload.Write(lease.At<float>(from_at_), rotation_->from, rotation_->pairs);
      upload.Write(lease.At<float>(to_at_), rotation_->to, rotation_->pairs);
    }
    return upload.Flush();
  }

  // The kept rows of each head, and that they are taken in order.
  void Pack(const Lease& lease, Upload* upload) const {
    const int64_t kept = destination_.tokens;
    const int64_t row_bytes = source_.dim * static_cast<int64_t>(DTypeSize(source_.dtype));
    auto* to = lease.At<std::byte>(packed_at_);
    for (int64_t head = 0; head < source_.heads; ++head) {
      const int32_t* const rows = rows_ + (per_head_ ? head * kept : 0);
      for (int64_t i = 0; i < kept; ++i, to += row_bytes) {
        upload->WriteBytes(to, source_.Row(head, rows[i]), row_bytes, /*pinned=*/false);
      }
    }
    std::vector<int32_t> in_order(static_cast<size_t>(kept));
    std::iota(in_order.begin(), in_order.end(), 0);
    for (int64_t head = 0; head < (per_head_ ? source_.heads : 1); ++head) {
      upload->Write<int32_t>(lease.At<int32_t>(rows_at_) + head * kept, in_order.data(), kept);
    }
  }

  absl::Status Launch(const Lease& lease) const {
    GatherJob job;
    job.source = in_place_ ? source_ : kept_;
    if (!in_place_) job.source.data = lease.At<void>(packed_at_);
    if (job.source.block_table != nullptr) job.source.block_table = lease.At<int32_t>(table_at_);
    job.positions = lease.At<int32_t>(rows_at_);
    job.per_head = per_head_;
    job.destination = destination_;
    if (!writes_in_place_) {
      job.destination = MutableTensorView::Dense(lease.At<void>(out_at_), source_.dtype, layout(),
                                                 source_.heads, destination_.tokens, source_.dim);
    }
    Device& device = lease.device();
    if (rotation_ == nullptr) {
      return device.Check(LaunchGather({&job, 1}, lease.stream()), "LaunchGather");
    }
    GatherRotatedJob rotated = {job, *rotation_};
    rotated.rotation.positions = lease.At<int32_t>(stood_at_);
    rotated.rotation.from = lease.At<float>(from_at_);
    rotated.rotation.to = lease.At<float>(to_at_);
    return device.Check(LaunchGatherRotated({&rotated, 1}, lease.stream()), "LaunchGatherRotated");
  }

  const TensorView source_;
  const int32_t* const rows_;
  const bool per_head_;
  const RotationParams* const rotation_;
  const MutableTensorView destination_;
  const int device_;            // whose memory either lies in; -1: none's
  const bool in_place_;         // the kernel reads the source where it is
  const bool writes_in_place_;  // and the destination
  TensorView kept_;             // [heads, kept, dim], dense
  Parts parts_;
  int64_t packed_at_ = 0, rows_at_ = 0, out_at_ = 0, table_at_ = 0;
  int64_t stood_at_ = 0, from_at_ = 0, to_at_ = 0;
};

absl::Status RunCall(Devices& devices, const TensorView& source, const int32_t* rows, bool per_head,
                     const RotationParams* rotation, const MutableTensorView& destination) {
  const absl::StatusOr<Place> from = devices.PlaceOf(source.data);
  if (!from.ok()) return from.status();
  const absl::StatusOr<Place> to = devices.PlaceOf(destination.data);
  if (!to.ok()) return to.status();
  if (from->on_device() && to->on_device() && from->device != to->device) {
    return absl::InvalidArgumentError(absl::StrCat("rows lie in the memory of GPU ", from->device,
                                                   " and are to go to GPU ", to->device,
                                                   "; both must be the same"));
  }
  return GatherCall(source, *from, rows, per_head, rotation, destination, *to).Run(devices);
}

}  // namespace

absl::Status Gather(Devices& devices, const TensorView& source, const int32_t* positions,
                    bool per_head, const MutableTensorView& destination) {
  return RunCall(devices, source, positions, per_head, nullptr, destination);
}

absl::Status GatherRotated(Devices& devices, const TensorView& source, const int32_t* rows,
                           bool per_head, const RotationParams& rotation,
                           const MutableTensorView& destination) {
  return RunCall(devices, source, rows, per_head, &rotation, destination);
}

absl::Status Zero(Devices& devices, int index, void* to, int64_t bytes) {
  absl::StatusOr<Lease> lease = devices.AcquireOn(index, 0);
  if (!lease.ok()) return lease.status();
  absl::Status status = lease->device().Check(
      cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), lease->stream()), "cudaMemsetAsync");
  return status.ok() ? WaitFor(*lease) : status;
}

absl::Status Fill(Devices& devices, int index, void* to, int64_t bytes, FillRun fill) {
  absl::StatusOr<Lease> lease = devices.AcquireOn(index, 0);
  if (!lease.ok()) return lease.status();
  Upload upload(*lease);
  upload.Fill(to, bytes, fill);
  absl::Status status = upload.Flush();
  return status.ok() ? WaitFor(*lease) : status;
}

}  // namespace structkv::cuda
