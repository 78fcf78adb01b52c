// A prompt is answered alike, to the bit, whether the backend takes its layers whole, step by step,
// or refuses to take them whole.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/layer_pass.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/forwarding_backend.h"
#include "tests/kernels/random_tensor.h"
#include "tests/properties/random_prompt.h"
#include "tests/testing/engine_answer.h"

namespace structkv::testkit {
namespace {

constexpr uint64_t kPrompts = 300;

// Takes layers whole by the steps of another backend, or says that it cannot.
class WholeLayers final : public structkv::testing::ForwardingBackend {
 public:
  WholeLayers(std::unique_ptr<Backend> real, bool refuses)
      : ForwardingBackend(std::move(real)),
        refuses_(refuses),
        capabilities_(ForwardingBackend::capabilities()) {
    capabilities_.whole_layers = true;
  }

  const BackendCapabilities& capabilities() const override { return capabilities_; }

  absl::Status RunLayer(const LayerPass& pass, BadStatistic* bad,
                        ParallelFor parallel) const override {
    ++layers_;
    if (refuses_) return absl::UnimplementedError("refused");
    const int64_t heads = pass.saliency.keys.heads;
    const int64_t tokens = pass.saliency.keys.tokens;
    std::vector<float> per_head(static_cast<size_t>(heads * tokens));
    std::vector<float> sum(static_cast<size_t>(tokens));
    absl::Status status = real().Saliency(pass.saliency, per_head.data(), bad, parallel);
    if (!status.ok()) return status;
    real().SumHeads(per_head.data(), heads, tokens, sum.data(), parallel);
    *pass.sums = real().Sums(sum.data(), tokens, pass.top_count, parallel);
    const int64_t sets = pass.per_head ? heads : 1;
    for (int64_t set = 0; set < sets; ++set) {
      const float* scores = pass.per_head ? per_head.data() + set * tokens : sum.data();
      std::vector<float> smoothed(static_cast<size_t>(tokens));
      const int64_t before_window = tokens - pass.window;
      if (pass.pooling != Pooling::kNone && before_window > 0) {
        real().Pool(scores, before_window, pass.pooling, pass.pooling_kernel, smoothed.data());
        scores = smoothed.data();
      }
      real().Select({.scores = scores, .tokens = tokens, .window = pass.window, .keep = pass.keep},
                    pass.positions + set * pass.keep);
    }
    for (const LayerPass::Rows& rows : pass.rows) {
      const int64_t before = pass.per_head ? rows.first_head * pass.keep : 0;
      status = real().Gather(rows.source, pass.positions + before, pass.per_head, rows.destination,
                             parallel);
      if (!status.ok()) return status;
    }
    if (pass.sum != nullptr) std::copy(sum.begin(), sum.end(), pass.sum);
    if (pass.heads != nullptr) std::copy(per_head.begin(), per_head.end(), pass.heads);
    return absl::OkStatus();
  }

  int64_t layers() const { return layers_; }

 private:
  const bool refuses_;
  BackendCapabilities capabilities_;
  mutable int64_t layers_ = 0;
};

class WholeLayerTest : public ::testing::TestWithParam<bool> {};

TEST_P(WholeLayerTest, AnswersAsStepByStep) {
  const std::unique_ptr<Backend> steps = structkv::testing::MakeBackend("reference");
  const WholeLayers whole(structkv::testing::MakeBackend("reference"), /*refuses=*/GetParam());
  engine::BufferPool pool(size_t{16} << 20);
  int64_t answered = 0;
  for (uint64_t i = 0; i < kPrompts && !HasFailure(); ++i) {
    const uint64_t seed = structkv::testing::Seed() + 900'000 + i;
    Random random(seed);
    PromptData data(RandomOpen(&random), seed);
    if (random.Chance(50)) AddTies(&data, &random);
    SCOPED_TRACE(absl::StrCat("seed ", seed, ": ", data.open().ShortDebugString()));
    const auto order = InOrder(data.layers());
    const absl::StatusOr<Answer> want = CompressDirectly(data, *steps, &pool, order, SerialFor);
    const absl::StatusOr<Answer> got = CompressDirectly(data, whole, &pool, order, SerialFor);
    ASSERT_TRUE(want.ok()) << want.status();
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_THAT(got->faults, ::testing::IsEmpty());
    EXPECT_TRUE(ResultBytes(*got) == ResultBytes(*want));
    answered += data.layers();
  }
  // Of what is random, a fifth has all that a layer in one call needs.
  EXPECT_GT(whole.layers(), answered / 8);
}

INSTANTIATE_TEST_SUITE_P(, WholeLayerTest, ::testing::Bool(),
                         [](const auto& each) { return each.param ? "refused" : "taken"; });

}  // namespace
}  // namespace structkv::testkit
