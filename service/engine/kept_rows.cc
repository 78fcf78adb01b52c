#include "service/engine/kept_rows.h"

namespace structkv::engine {
namespace {

// Room for kept rows of `heads`; what of it lies behind the last row is set to zero.
absl::StatusOr<MutableTensorView> RoomOf(const PromptSpec& spec, const Backend& backend,
                                         std::byte* data, int64_t heads, int64_t kept,
                                         int64_t dim) {
  if (!spec.paged.has_value()) {
    return MutableTensorView::Dense(data, spec.dtype, spec.layout, heads, kept, dim);
  }
  const int64_t block_tokens = spec.paged->block_tokens;
  const int64_t in_whole_blocks = kept / block_tokens * block_tokens;
  const auto slot = heads * dim * static_cast<int64_t>(DTypeSize(spec.dtype));
  absl::Status status =
      backend.Zero(data + in_whole_blocks * slot, (spec.kv_slots(kept) - in_whole_blocks) * slot);
  if (!status.ok()) return status;
  return MutableTensorView::Paged(data, spec.dtype, spec.layout, heads, kept, dim, block_tokens);
}

}  // namespace

bool StaysWhole(const PromptSpec& spec, const KeptTensor& tensor, const Buffer& source,
                const Buffer& room) {
  return !source.is_lent() && room.empty() && tensor.kept == tensor.all.tokens &&
         !tensor.all.paged() && !tensor.turned && DecodeRuns(spec, tensor.heads).size() == 1;
}

absl::StatusOr<KeptRows> KeptRows::Plan(const PromptSpec& spec, const Backend& backend,
                                        BufferPool& pool, const KeptTensor& tensor, Buffer room) {
  const TensorView& all = tensor.all;
  const auto element = static_cast<int64_t>(DTypeSize(spec.dtype));
  const int64_t head_bytes = spec.kv_slots(tensor.kept) * all.dim * element;
  const auto bytes = static_cast<size_t>(tensor.heads.count * head_bytes);
  KeptRows kept;
  kept.kept_ = tensor.kept;
  if (room.empty()) room = spec.held ? pool.Acquire(bytes) : pool.AcquirePinned(bytes);
  kept.rows_ = std::move(room);
  kept.rows_.Truncate(bytes);
  for (const HeadRange& run : DecodeRuns(spec, tensor.heads)) {
    const absl::StatusOr<MutableTensorView> to = RoomOf(
        spec, backend, kept.rows_.data() + run.begin * head_bytes, run.count, tensor.kept, all.dim);
    if (!to.ok()) return to.status();
    LayerPass::Rows& rows = kept.runs_.emplace_back();
    rows = {.source = all, .destination = *to, .first_head = run.begin};
    rows.source.data =
        static_cast<const std::byte*>(all.data) + run.begin * all.head_stride * element;
    rows.source.heads = run.count;
  }
  return kept;
}

absl::Status KeptRows::Gather(const PromptSpec& spec, const Backend& backend,
                              const int32_t* positions, const RotationParams* rotation,
                              ParallelFor parallel) const {
  const bool per_head = spec.per_kv_head();
  for (const LayerPass::Rows& run : runs_) {
    const int64_t before = (per_head ? run.first_head : 0) * kept_;
    absl::Status status;
    if (rotation == nullptr) {
      status = backend.Gather(run.source, positions + before, per_head, run.destination, parallel);
    } else {
      RotationParams params = *rotation;
      params.positions += before;
      status = backend.GatherRotated(run.source, positions + before, per_head, params,
                                     run.destination, parallel);
    }
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace structkv::engine
