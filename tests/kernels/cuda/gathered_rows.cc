#include "tests/kernels/cuda/gathered_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "tests/kernels/rotation_bound.h"

namespace structkv::testing {
namespace {

constexpr std::byte kUntouched{0x5A};
constexpr int64_t kGuardBytes = 48;

}  // namespace

std::string GatherShape::Text() const {
  return std::string(DTypeName(dtype)) + ", " + std::to_string(heads) + " heads, " +
         std::to_string(kept) + " of " + std::to_string(tokens) + ", dim " + std::to_string(dim) +
         (per_head ? ", per head, " : ", ") + std::string(LayoutName(layout)) + " in blocks of " +
         std::to_string(block_tokens) + " + " + std::to_string(misalign) + " to " +
         std::string(LayoutName(to_layout)) + " in blocks of " + std::to_string(to_block_tokens) +
         " + " + std::to_string(to_misalign);
}

GatheredRows::GatheredRows(const GatherShape& shape, std::mt19937_64& random)
    : shape_(shape),
      dense_(shape.dtype, shape.layout, shape.heads, shape.tokens,
             shape.row_dim != 0 ? shape.row_dim : shape.dim, shape.misalign) {
  dense_.Fill(random);
  if (shape.block_tokens != 0) {
    paged_.emplace(dense_.view(), shape.layout, shape.block_tokens, random);
  }
  std::vector<int32_t> all(static_cast<size_t>(shape.tokens));
  for (int64_t h = 0; h < (shape.per_head ? shape.heads : 1); ++h) {
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), random);
    std::sort(all.begin(), all.begin() + shape.kept);
    positions_.insert(positions_.end(), all.begin(), all.begin() + shape.kept);
  }
  const int64_t block = shape.to_block_tokens;
  const int64_t room = block == 0 ? shape.kept : (shape.kept + block - 1) / block * block;
  const int64_t bytes =
      room * shape.heads * shape.dim * static_cast<int64_t>(DTypeSize(shape.dtype));
  got_.assign(static_cast<size_t>(shape.to_misalign + bytes + kGuardBytes), kUntouched);
  want_ = got_;
}

cuda::GatherJob GatheredRows::job() {
  return {source(), positions_.data(), shape_.per_head, To(got_)};
}

TensorView GatheredRows::source() const {
  TensorView view = paged_ ? paged_->view() : dense_.view();
  view.dim = shape_.dim;
  return view;
}

void GatheredRows::Expect(const Backend& reference) {
  EXPECT_EQ(reference.Gather(source(), positions_.data(), shape_.per_head, To(want_), SerialFor),
            absl::OkStatus());
  EXPECT_TRUE(got_ == want_) << shape_.Text();
}

void GatheredRows::ExpectMoved(const Backend& reference, const RotationParams& rotation) {
  EXPECT_EQ(reference.GatherRotated(source(), positions_.data(), shape_.per_head, rotation,
                                    To(want_), SerialFor),
            absl::OkStatus());
  ExpectRotated(rotation, View(got_), View(want_), shape_.Text());
  // And nothing around the rows was written.
  const MutableTensorView got = To(got_);
  const MutableTensorView want = To(want_);
  const size_t row_bytes = static_cast<size_t>(shape_.dim) * DTypeSize(shape_.dtype);
  for (int64_t h = 0; h < shape_.heads; ++h) {
    for (int64_t i = 0; i < shape_.kept; ++i) {
      std::memcpy(got.Row(h, i), want.Row(h, i), row_bytes);
    }
  }
  EXPECT_TRUE(got_ == want_) << shape_.Text();
}

MutableTensorView GatheredRows::To(std::vector<std::byte>& bytes) const {
  std::byte* const data = bytes.data() + shape_.to_misalign;
  return shape_.to_block_tokens == 0
             ? MutableTensorView::Dense(data, shape_.dtype, shape_.to_layout, shape_.heads,
                                        shape_.kept, shape_.dim)
             : MutableTensorView::Paged(data, shape_.dtype, shape_.to_layout, shape_.heads,
                                        shape_.kept, shape_.dim, shape_.to_block_tokens);
}

TensorView GatheredRows::View(const std::vector<std::byte>& bytes) const {
  const MutableTensorView v = To(const_cast<std::vector<std::byte>&>(bytes));
  return {v.data,        v.dtype,        v.heads, v.tokens,       v.dim,
          v.head_stride, v.token_stride, nullptr, v.block_tokens, v.block_stride};
}

}  // namespace structkv::testing
