// A layer in one call, of the backends that have it, against the same backend's steps one by one.
#include "kernels/layer_pass.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/paged_tensor.h"
#include "tests/kernels/random_tensor.h"
#include "tests/kernels/saliency_inputs.h"

namespace structkv {
namespace {

using ::testing::Combine;
using testing::Inputs;
using testing::PagedTensor;
using testing::Tensor;
using ::testing::Values;
using ::testing::ValuesIn;

// What is selected from: `heads` by each KV head's saliency, and smoothed.
struct Selection {
  bool per_head;
  Pooling pooling;
};

// What a layer gives.
struct Outcome {
  std::vector<float> heads, sum;
  std::vector<int32_t> positions;
  SaliencySums sums;
};

using Case = std::tuple<std::string, DType, Layout, Selection>;

class LayerPassTest : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr testing::Shape kShape = {6, 3, 251, 64, 8};
  static constexpr int64_t kValueDim = 40;
  static constexpr int64_t kKeep = 37;
  static constexpr int64_t kKernel = 5;

  LayerPassTest() { values_.Fill(random_); }

  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(std::get<0>(GetParam()));
  const DType dtype_ = std::get<1>(GetParam());
  const Layout layout_ = std::get<2>(GetParam());
  const Selection selection_ = std::get<3>(GetParam());
  std::mt19937_64 random_ = testing::Random(77);
  const testing::Types types_ = {IsFp8(dtype_) ? DType::kBF16 : dtype_, dtype_};
  const Inputs inputs_ = Inputs(kShape, types_, layout_, random_);
  Tensor values_ = Tensor(dtype_, layout_, kShape.kv_heads, kShape.tokens, kValueDim);

  int64_t sets() const { return selection_.per_head ? kShape.kv_heads : 1; }

  LayerPass PassOf(const SaliencyParams& params, Outcome* out) const {
    out->heads.assign(static_cast<size_t>(kShape.kv_heads * kShape.tokens), -1.0F);
    out->sum.assign(static_cast<size_t>(kShape.tokens), -1.0F);
    out->positions.assign(static_cast<size_t>(sets() * kKeep), -1);
    return {.saliency = params,
            .top_count = 25,
            .per_head = selection_.per_head,
            .pooling = selection_.pooling,
            .pooling_kernel = kKernel,
            .window = kShape.window,
            .keep = kKeep,
            .heads = out->heads.data(),
            .sum = out->sum.data(),
            .positions = out->positions.data(),
            .sums = &out->sums};
  }

  Outcome StepByStep(const SaliencyParams& params) const {
    Outcome out;
    const LayerPass pass = PassOf(params, &out);
    EXPECT_EQ(backend_->Saliency(params, pass.heads, nullptr, SerialFor), absl::OkStatus());
    backend_->SumHeads(pass.heads, kShape.kv_heads, kShape.tokens, pass.sum, SerialFor);
    out.sums = backend_->Sums(pass.sum, kShape.tokens, pass.top_count, SerialFor);
    for (int64_t set = 0; set < sets(); ++set) {
      const float* scores = pass.per_head ? pass.heads + set * kShape.tokens : pass.sum;
      std::vector<float> smoothed(static_cast<size_t>(kShape.tokens));
      if (pass.pooling != Pooling::kNone) {
        backend_->Pool(scores, kShape.tokens - kShape.window, pass.pooling, kKernel,
                       smoothed.data());
        scores = smoothed.data();
      }
      backend_->Select(
          {.scores = scores, .tokens = kShape.tokens, .window = kShape.window, .keep = kKeep},
          pass.positions + set * kKeep);
    }
    return out;
  }

  Tensor Room(int64_t dim, int64_t heads = kShape.kv_heads) const {
    return {dtype_, layout_, heads, kKeep, dim};
  }

  // Bit for bit.
  void ExpectRows(const TensorView& source, const Outcome& outcome, Tensor& got,
                  int64_t first_head = 0) const {
    Tensor want = Room(source.dim, source.heads);
    const int64_t before = selection_.per_head ? first_head * kKeep : 0;
    ASSERT_EQ(backend_->Gather(source, outcome.positions.data() + before, selection_.per_head,
                               want.mutable_view(), SerialFor),
              absl::OkStatus());
    const auto row_bytes = static_cast<size_t>(source.dim) * DTypeSize(source.dtype);
    for (int64_t head = 0; head < source.heads; ++head) {
      for (int64_t i = 0; i < kKeep; ++i) {
        ASSERT_EQ(std::memcmp(got.view().Row(head, i), want.view().Row(head, i), row_bytes), 0)
            << "head " << head << ", row " << i;
      }
    }
  }

  static void ExpectSame(const Outcome& got, const Outcome& want) {
    EXPECT_EQ(got.positions, want.positions);
    EXPECT_EQ(got.heads, want.heads);
    EXPECT_EQ(got.sum, want.sum);
    EXPECT_DOUBLE_EQ(got.sums.total, want.sums.total);
    EXPECT_DOUBLE_EQ(got.sums.sum_s_log_s, want.sums.sum_s_log_s);
    EXPECT_DOUBLE_EQ(got.sums.sum_squares, want.sums.sum_squares);
    EXPECT_DOUBLE_EQ(got.sums.top_mass, want.sums.top_mass);
  }
};

TEST_P(LayerPassTest, GivesWhatTheStepsGive) {
  const SaliencyParams params = inputs_.params();
  Outcome got;
  LayerPass pass = PassOf(params, &got);
  Tensor kept_keys = Room(kShape.dim);
  Tensor kept_values = Room(kValueDim);
  pass.rows = {{.source = params.keys, .destination = kept_keys.mutable_view()},
               {.source = values_.view(), .destination = kept_values.mutable_view()}};
  ASSERT_EQ(backend_->RunLayer(pass, nullptr, SerialFor), absl::OkStatus());
  const Outcome want = StepByStep(params);
  ExpectSame(got, want);
  ExpectRows(params.keys, want, kept_keys);
  ExpectRows(values_.view(), want, kept_values);
}

// With the log-sum-exp, from blocks, of some heads, and no more of the outputs than are needed.
TEST_P(LayerPassTest, TakesBlocksAndSomeHeads) {
  SaliencyParams params = inputs_.params();
  const std::vector<float> lse = testing::RowLse(params);
  params.lse = lse.data();
  const PagedTensor paged_keys(params.keys, layout_, 16, random_);
  const PagedTensor paged_values(values_.view(), layout_, 16, random_);
  params.keys = paged_keys.view();
  Outcome got;
  LayerPass pass = PassOf(params, &got);
  pass.heads = nullptr;
  pass.sum = nullptr;
  const auto last_heads = [](TensorView view) {
    view.data = static_cast<const std::byte*>(view.data) +
                view.head_stride * static_cast<int64_t>(DTypeSize(view.dtype));
    view.heads -= 1;
    return view;
  };
  const TensorView keys = last_heads(params.keys);
  const TensorView values = last_heads(paged_values.view());
  Tensor kept_keys = Room(kShape.dim, keys.heads);
  Tensor kept_values = Room(kValueDim, values.heads);
  pass.rows = {{.source = keys, .destination = kept_keys.mutable_view(), .first_head = 1},
               {.source = values, .destination = kept_values.mutable_view(), .first_head = 1}};
  ASSERT_EQ(backend_->RunLayer(pass, nullptr, SerialFor), absl::OkStatus());
  const Outcome want = StepByStep(params);
  EXPECT_EQ(got.positions, want.positions);
  EXPECT_DOUBLE_EQ(got.sums.top_mass, want.sums.top_mass);
  ExpectRows(keys, want, kept_keys, 1);
  ExpectRows(values, want, kept_values, 1);
}

// The sum goes to a vector on the GPU, and from there to centrality, and need not come back.
TEST_P(LayerPassTest, LeavesTheSumWhereItIsComputed) {
  const SaliencyParams params = inputs_.params();
  const std::unique_ptr<ResidentVectors> vectors =
      backend_->Resident(2, kShape.tokens, params.keys.data, nullptr);
  ASSERT_GE(vectors->gpu(), 0);
  Outcome got;
  LayerPass pass = PassOf(params, &got);
  pass.heads = nullptr;
  pass.resident = vectors.get();
  pass.resident_to = {.vector = 1};
  ASSERT_EQ(backend_->RunLayer(pass, nullptr, SerialFor), absl::OkStatus());
  std::vector<float> left(static_cast<size_t>(kShape.tokens));
  ASSERT_EQ(vectors->Read(1, left.data()), absl::OkStatus());
  EXPECT_EQ(left, got.sum);

  pass.resident_to.decay = 0.9F;
  pass.sum = nullptr;
  ASSERT_EQ(backend_->RunLayer(pass, nullptr, SerialFor), absl::OkStatus());
  std::vector<float> centrality = got.sum;
  backend_->Accumulate(0.9F, got.sum.data(), centrality.data(), kShape.tokens, SerialFor);
  ASSERT_EQ(vectors->Read(1, left.data()), absl::OkStatus());
  EXPECT_EQ(left, centrality);
  EXPECT_EQ(got.positions, StepByStep(params).positions);
}

TEST_P(LayerPassTest, NamesAValueThatIsNotFinite) {
  Inputs inputs(kShape, types_, layout_, random_);
  inputs.queries.Set(4, 2, 1, std::numeric_limits<float>::quiet_NaN());
  Outcome got;
  BadStatistic bad;
  BadStatistic bad_of_step;
  const LayerPass pass = PassOf(inputs.params(), &got);
  const absl::Status status = backend_->RunLayer(pass, &bad, SerialFor);
  const absl::Status of_step =
      backend_->Saliency(inputs.params(), got.heads.data(), &bad_of_step, SerialFor);
  EXPECT_EQ(status, of_step);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(bad.head, bad_of_step.head);
  EXPECT_EQ(bad.token, bad_of_step.token);
}

std::string NameOf(const ::testing::TestParamInfo<Case>& info) {
  const auto& [backend, dtype, layout, selection] = info.param;
  const std::string pooling = selection.pooling == Pooling::kNone  ? ""
                              : selection.pooling == Pooling::kAvg ? "_avg"
                                                                   : "_max";
  return backend + "_" + std::string(DTypeName(dtype)) + "_" + std::string(LayoutName(layout)) +
         (selection.per_head ? "_per_head" : "_sum") + pooling;
}

INSTANTIATE_TEST_SUITE_P(
    All, LayerPassTest,
    Combine(ValuesIn(testing::BackendsUnderTest()), Values(DType::kBF16, DType::kF8E4M3),
            Values(Layout::kHeadTokenDim, Layout::kTokenHeadDim),
            Values(Selection{false, Pooling::kNone}, Selection{false, Pooling::kMax},
                   Selection{true, Pooling::kNone}, Selection{true, Pooling::kAvg})),
    NameOf);

}  // namespace
}  // namespace structkv
