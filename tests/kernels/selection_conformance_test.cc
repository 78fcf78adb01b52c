// What follows the saliency, for every backend on every instruction set, against plain definitions:
// pooling, sums, centrality, selection and gather.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/random_tensor.h"

namespace structkv {
namespace {

constexpr float kEpsilon = std::numeric_limits<float>::epsilon();
// Tails of every vector width, blocks, and the largest prompt that matters.
constexpr int64_t kTokens[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 1000, 4099, 131072};

// Saliency as it comes: many small values and a few large ones.
std::vector<float> Scores(int64_t tokens, uint64_t number) {
  std::mt19937_64 random = testing::Random(number);
  std::lognormal_distribution<float> distribution(-6.0F, 3.0F);
  std::vector<float> scores(tokens);
  for (float& s : scores) s = distribution(random);
  return scores;
}

class SelectionTest : public ::testing::TestWithParam<std::string> {
 protected:
  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(GetParam());

  // The window and the best of the others, ties to the lower position.
  static std::vector<int32_t> Wanted(const SelectParams& params) {
    std::vector<int32_t> order(params.tokens - params.window);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return params.scores[a] > params.scores[b]; });
    order.resize(params.keep - params.window);
    for (int64_t j = params.tokens - params.window; j < params.tokens; ++j) {
      order.push_back(static_cast<int32_t>(j));
    }
    std::sort(order.begin(), order.end());
    return order;
  }

  void ExpectSelected(const std::vector<float>& scores, int64_t window, int64_t keep) {
    const SelectParams params = {.scores = scores.data(),
                                 .tokens = static_cast<int64_t>(scores.size()),
                                 .window = window,
                                 .keep = keep};
    constexpr int32_t kGuard = -77;
    std::vector<int32_t> got(keep + 1, kGuard);
    backend_->Select(params, got.data());
    EXPECT_EQ(got.back(), kGuard) << "wrote past the end";
    got.pop_back();
    EXPECT_TRUE(got == Wanted(params))
        << scores.size() << " tokens, window " << window << ", keep " << keep;
  }

  void ExpectAllBudgets(const std::vector<float>& scores) {
    const auto tokens = static_cast<int64_t>(scores.size());
    for (const int64_t window : {int64_t{0}, int64_t{8}, tokens}) {
      if (window > tokens) continue;
      for (const int64_t keep : {window, window + 1, tokens / 10, tokens / 2, tokens - 1, tokens}) {
        if (keep >= window && keep <= tokens) ExpectSelected(scores, window, keep);
      }
    }
  }
};

TEST_P(SelectionTest, KeepsTheBestAndTheWindow) {
  for (const int64_t tokens : kTokens) ExpectAllBudgets(Scores(tokens, 100 + tokens));
}

TEST_P(SelectionTest, TiesGoToTheLowerPosition) {
  for (const int64_t tokens : {17, 1000, 4099}) {
    ExpectAllBudgets(std::vector<float>(tokens, 0.0F));
    std::vector<float> few = Scores(tokens, tokens);
    for (float& s : few)
      s = std::ceil(std::log2(s)) / 16.0F;  // few values, negative ones among them
    ExpectAllBudgets(few);
  }
}

TEST_P(SelectionTest, OrdersEveryKindOfNumber) {
  std::vector<float> scores = Scores(3000, 5);
  for (size_t j = 0; j < scores.size(); ++j) {
    if (j % 7 == 1) scores[j] = -scores[j];
    if (j % 11 == 2) scores[j] = 0.0F;
    if (j % 13 == 3) scores[j] = std::numeric_limits<float>::denorm_min() * static_cast<float>(j);
    if (j % 101 == 4) scores[j] = std::numeric_limits<float>::max();
    if (j % 103 == 5) scores[j] = std::numeric_limits<float>::lowest();
  }
  ExpectAllBudgets(scores);
  // Neighbours in the last bit, in descending order.
  float value = 1.0F;
  for (float& s : scores) s = value = std::nextafter(value, 0.0F);
  ExpectAllBudgets(scores);
  std::reverse(scores.begin(), scores.end());
  ExpectAllBudgets(scores);
}

TEST_P(SelectionTest, PoolsAlongTheTokens) {
  for (const int64_t tokens : kTokens) {
    if (tokens > 5000) continue;
    const std::vector<float> in = Scores(tokens, 300 + tokens);
    for (const int64_t kernel : {1, 3, 5, 7, 63}) {
      std::vector<float> average(tokens);
      std::vector<float> maximum(tokens);
      std::vector<float> none(tokens);
      backend_->Pool(in.data(), tokens, Pooling::kAvg, kernel, average.data());
      backend_->Pool(in.data(), tokens, Pooling::kMax, kernel, maximum.data());
      backend_->Pool(in.data(), tokens, Pooling::kNone, kernel, none.data());
      EXPECT_TRUE(none == in);
      for (int64_t j = 0; j < tokens; ++j) {
        const auto begin = in.begin() + std::max<int64_t>(0, j - kernel / 2);
        const auto end = in.begin() + std::min(tokens, j + kernel / 2 + 1);
        const double mean = std::accumulate(begin, end, 0.0) / static_cast<double>(kernel);
        // One rounding per addition of positive numbers.
        ASSERT_NEAR(average[j], mean, static_cast<double>(kernel) * kEpsilon * mean)
            << tokens << " tokens, kernel " << kernel << ", token " << j;
        ASSERT_EQ(maximum[j], *std::max_element(begin, end))
            << tokens << " tokens, kernel " << kernel << ", token " << j;
      }
    }
  }
}

TEST_P(SelectionTest, SumsForTheMetrics) {
  for (const int64_t tokens : kTokens) {
    std::vector<float> scores = Scores(tokens, 500 + tokens);
    scores[tokens / 2] = 0.0F;
    std::vector<float> sorted = scores;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    double total = 0;
    double logs = 0;
    double magnitudes = 0;  // what errors of the logarithms are relative to
    double squares = 0;
    for (const double s : scores) {
      total += s;
      squares += s * s;
      if (s > 0) logs += s * std::log(s);
      if (s > 0) magnitudes += s * (1 + std::fabs(std::log(s)));
    }
    for (const int64_t top : {int64_t{0}, int64_t{1}, tokens / 10, tokens}) {
      const SaliencySums sums =
          backend_->Sums(scores.data(), tokens, top, testing::BackwardsOnThreads);
      const double mass = std::accumulate(sorted.begin(), sorted.begin() + top, 0.0);
      const std::string what = std::to_string(tokens) + " tokens, top " + std::to_string(top);
      EXPECT_NEAR(sums.total, total, 1e-12 * total) << what;
      EXPECT_NEAR(sums.sum_squares, squares, 1e-12 * squares) << what;
      EXPECT_NEAR(sums.top_mass, mass, 1e-12 * total) << what;
      EXPECT_NEAR(sums.sum_s_log_s, logs, 4 * kEpsilon * magnitudes) << what;
    }
  }
}

TEST_P(SelectionTest, SumsHeadsInOrderAndAccumulates) {
  for (const int64_t tokens : kTokens) {
    constexpr int64_t kHeads = 5;
    const std::vector<float> heads = Scores(kHeads * tokens, 700 + tokens);
    std::vector<float> sum(tokens);
    backend_->SumHeads(heads.data(), kHeads, tokens, sum.data(), testing::BackwardsOnThreads);
    std::vector<float> centrality = Scores(tokens, 800 + tokens);
    const std::vector<float> before = centrality;
    backend_->Accumulate(0.9F, sum.data(), centrality.data(), tokens, testing::BackwardsOnThreads);
    for (int64_t j = 0; j < tokens; ++j) {
      double wanted = 0;
      for (int64_t h = 0; h < kHeads; ++h) wanted += heads[h * tokens + j];
      ASSERT_NEAR(sum[j], wanted, kHeads * kEpsilon * wanted) << tokens << " tokens, token " << j;
      const double next = static_cast<double>(0.9F) * before[j] + sum[j];
      ASSERT_NEAR(centrality[j], next, 2 * kEpsilon * next) << tokens << " tokens, token " << j;
    }
  }
}

TEST_P(SelectionTest, FindsTheLowestBadValue) {
  constexpr int64_t kHeads = 3;
  const float bad_values[] = {std::numeric_limits<float>::quiet_NaN(),
                              std::numeric_limits<float>::infinity(), -1e-30F};
  for (const int64_t tokens : {1, 9, 17, 1000, 4099}) {
    std::vector<float> values = Scores(kHeads * tokens, 900 + tokens);
    EXPECT_FALSE(
        backend_->FindBad(values.data(), kHeads, tokens, testing::BackwardsOnThreads).has_value());
    values[0] = -0.0F;  // no negative value
    EXPECT_FALSE(
        backend_->FindBad(values.data(), kHeads, tokens, testing::BackwardsOnThreads).has_value());
    for (const float value : bad_values) {
      for (const int64_t token : {int64_t{0}, tokens / 2, tokens - 1}) {
        std::vector<float> spoilt = values;
        spoilt[2 * tokens + token] = value;
        spoilt[1 * tokens + token] = value;
        spoilt[tokens - 1] = token < tokens - 1 ? value : spoilt[tokens - 1];  // a later token
        const auto bad =
            backend_->FindBad(spoilt.data(), kHeads, tokens, testing::BackwardsOnThreads);
        ASSERT_TRUE(bad.has_value()) << value << " at " << token << " of " << tokens;
        EXPECT_EQ(bad->token, token);
        EXPECT_EQ(bad->head, 1);
      }
    }
  }
}

// Gathers `kept` rows of each head and compares them with the source's.
void CheckGather(const Backend& backend, const testing::Tensor& source, Layout layout, int64_t kept,
                 bool per_head, int64_t misalign, std::mt19937_64& random) {
  const TensorView from = source.view();
  std::vector<int32_t> positions;
  for (int64_t h = 0; h < (per_head ? from.heads : 1); ++h) {
    std::vector<int32_t> all(static_cast<size_t>(from.tokens));
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), random);
    std::sort(all.begin(), all.begin() + kept);
    positions.insert(positions.end(), all.begin(), all.begin() + kept);
  }
  testing::Tensor out(from.dtype, layout, from.heads, kept, from.dim, misalign);
  EXPECT_EQ(backend.Gather(from, positions.data(), per_head, out.mutable_view(),
                           testing::BackwardsOnThreads),
            absl::OkStatus());
  for (int64_t h = 0; h < from.heads; ++h) {
    for (int64_t i = 0; i < kept; ++i) {
      const int32_t position = positions[(per_head ? h * kept : 0) + i];
      ASSERT_EQ(std::memcmp(out.view().Row(h, i), from.Row(h, position),
                            static_cast<size_t>(from.dim) * DTypeSize(from.dtype)),
                0)
          << DTypeName(from.dtype) << ", " << LayoutName(layout) << ", dim " << from.dim
          << ", head " << h << ", row " << i;
    }
  }
}

TEST_P(SelectionTest, GathersRowsToTheByte) {
  constexpr int64_t kHeads = 3;
  constexpr int64_t kCount = 300;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const Layout layout : {Layout::kHeadTokenDim, Layout::kTokenHeadDim}) {
      for (const int64_t dim : {32, 64, 96, 128, 192, 256, 576}) {
        for (const bool per_head : {false, true}) {
          std::mt19937_64 random = testing::Random(static_cast<uint64_t>(dim) + 1000);
          testing::Tensor source(dtype, layout, kHeads, kCount, dim, /*misalign=*/3);
          source.Fill(random);
          for (const int64_t kept : {int64_t{1}, int64_t{37}, kCount}) {
            CheckGather(*backend_, source, layout, kept, per_head, /*misalign=*/1, random);
            CheckGather(*backend_, source, layout, kept, per_head, /*misalign=*/0, random);
          }
        }
      }
    }
  }
}

// Large enough that the rows go past the caches, where a backend does that.
TEST_P(SelectionTest, GathersManyRowsToTheByte) {
  constexpr int64_t kHeads = 4;
  for (const Layout layout : {Layout::kHeadTokenDim, Layout::kTokenHeadDim}) {
    for (const int64_t dim : {40, 128}) {
      const int64_t kept = (int64_t{9} << 20) / (kHeads * dim * 2);
      std::mt19937_64 random = testing::Random(static_cast<uint64_t>(dim) + 1100);
      testing::Tensor source(DType::kBF16, layout, kHeads, kept + 1000, dim);
      source.Fill(random);
      for (const bool per_head : {false, true}) {
        CheckGather(*backend_, source, layout, kept, per_head, /*misalign=*/0, random);
        CheckGather(*backend_, source, layout, kept, per_head, /*misalign=*/8, random);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, SelectionTest, ::testing::ValuesIn(testing::BackendsUnderTest()),
                         [](const auto& instance) { return instance.param; });

}  // namespace
}  // namespace structkv
