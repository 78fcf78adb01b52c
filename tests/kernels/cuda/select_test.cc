// The kernels that select, on the host or on a GPU (cuda_kernels.h), against the reference backend.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/select_plan.h"
#include "kernels/cuda/statistics_kernel.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/cuda/cuda_kernels.h"
#include "tests/kernels/random_tensor.h"

namespace structkv::cuda {
namespace {

using testing::RunCudaPool;
using testing::RunCudaSelect;
using testing::RunCudaStatistics;
using testing::SelectWay;

constexpr int32_t kGuard = -77;
const float kLargestFloat = std::numeric_limits<float>::max();

std::vector<float> Scores(int64_t tokens, uint64_t number) {
  std::mt19937_64 random = testing::Random(number);
  std::lognormal_distribution<float> distribution(-6.0F, 3.0F);
  std::vector<float> scores(static_cast<size_t>(tokens));
  for (float& s : scores) s = distribution(random);
  return scores;
}

std::vector<SelectWay> Ways() {
  return {{true, 1, 32}, {true, 2, 64}, {true, 4, 32}, {false, 1, 32}, {false, 3, 64}};
}

class CudaSelectTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string why = testing::WhyNoCuda(); !why.empty()) GTEST_SKIP() << why;
  }

  void ExpectSelected(const SelectWay& way, const std::vector<float>& scores, int64_t window,
                      int64_t keep) {
    const auto tokens = static_cast<int64_t>(scores.size());
    std::vector<int32_t> want(static_cast<size_t>(keep));
    reference_->Select({scores.data(), tokens, window, keep}, want.data());
    std::vector<int32_t> got(static_cast<size_t>(keep + 1), kGuard);
    RunCudaSelect(way, {{.scores = scores.data(),
                         .tokens = tokens,
                         .positions = got.data(),
                         .window = window,
                         .keep = keep}});
    EXPECT_EQ(got.back(), kGuard) << "wrote past the end";
    got.pop_back();
    EXPECT_TRUE(got == want) << way.Text() << ": " << tokens << " tokens, window " << window
                             << ", keep " << keep;
  }

  void ExpectAllBudgets(const std::vector<float>& scores) {
    const auto tokens = static_cast<int64_t>(scores.size());
    for (const SelectWay& way : Ways()) {
      for (const int64_t window : {int64_t{0}, int64_t{8}, tokens}) {
        if (window > tokens) continue;
        std::vector<int64_t> keeps = {window,     window + 1, tokens / 10,
                                      tokens / 2, tokens - 1, tokens};
        std::sort(keeps.begin(), keeps.end());
        keeps.erase(std::unique(keeps.begin(), keeps.end()), keeps.end());
        for (const int64_t keep : keeps) {
          if (keep >= window && keep <= tokens) ExpectSelected(way, scores, window, keep);
        }
      }
    }
  }

  // Positions and sums of scores that are not negative, both and alone.
  void ExpectSums(const std::vector<float>& scores) {
    const auto tokens = static_cast<int64_t>(scores.size());
    std::vector<SumsPart> parts(static_cast<size_t>(SumsParts(tokens)));
    RunCudaStatistics(
        {.values = scores.data(), .heads = 1, .tokens = tokens, .parts = parts.data()});
    const int64_t window = std::min<int64_t>(tokens, 8);
    const int64_t keep = std::max(window, tokens / 3);
    std::vector<int32_t> want_positions(static_cast<size_t>(keep));
    reference_->Select({scores.data(), tokens, window, keep}, want_positions.data());
    for (const int64_t top : {int64_t{0}, int64_t{1}, tokens / 10, keep - window, keep, tokens}) {
      const SaliencySums want = reference_->Sums(scores.data(), tokens, top, SerialFor);
      std::vector<RowSums> all;
      for (const SelectWay& way : Ways()) {
        std::vector<int32_t> positions(static_cast<size_t>(keep));
        RowSums got;
        RunCudaSelect(way, {{.scores = scores.data(),
                             .tokens = tokens,
                             .positions = positions.data(),
                             .window = window,
                             .keep = keep,
                             .sums = &got,
                             .top_count = top,
                             .parts = parts.data()}});
        EXPECT_TRUE(positions == want_positions) << way.Text() << ", " << tokens << ", top " << top;
        RowSums alone;
        RunCudaSelect(way, {{.scores = scores.data(),
                             .tokens = tokens,
                             .sums = &alone,
                             .top_count = top,
                             .parts = parts.data()}});
        all.push_back(got);
        all.push_back(alone);
        const std::string what =
            way.Text() + ": " + std::to_string(tokens) + " tokens, top " + std::to_string(top);
        EXPECT_NEAR(got.all.total, want.total, 1e-12 * want.total) << what;
        EXPECT_NEAR(got.all.sum_squares, want.sum_squares, 1e-12 * want.sum_squares) << what;
        EXPECT_NEAR(got.top_mass, want.top_mass, 1e-12 * want.total) << what;
        EXPECT_NEAR(got.all.sum_s_log_s, want.sum_s_log_s,
                    1e-12 * (std::fabs(want.sum_s_log_s) + want.total))
            << what;
      }
      for (const RowSums& each : all) EXPECT_EQ(std::memcmp(&each, &all[0], sizeof(each)), 0);
    }
  }

  const std::unique_ptr<Backend> reference_ = reference::CreateReferenceBackend();
  std::mt19937_64 random_ = testing::Random(4000);
};

TEST_F(CudaSelectTest, KeysAreOrderedAsTheValues) {
  std::mt19937_64 random = testing::Random(4001);
  std::vector<float> values = {-kLargestFloat, -1.0F, -1e-45F, 0.0F, 1e-45F, 1.0F, kLargestFloat};
  for (int i = 0; i < 2000; ++i) {
    const auto bits = static_cast<uint32_t>(random());
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    if (std::isfinite(value)) values.push_back(value);
  }
  std::sort(values.begin(), values.end());
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(KeyValue(OrderedKey(values[i])), values[i]);
    EXPECT_LT(OrderedKey(values[i]), CutOfNothing().threshold);
    if (i > 0 && values[i - 1] < values[i]) {
      EXPECT_LT(OrderedKey(values[i - 1]), OrderedKey(values[i]));
    }
  }
  EXPECT_EQ(OrderedKey(-0.0F), OrderedKey(0.0F));
}

TEST_F(CudaSelectTest, DigitsMakeTheKey) {
  std::mt19937_64 random = testing::Random(4002);
  for (int i = 0; i < 2000; ++i) {
    const auto key = static_cast<uint32_t>(random());
    uint32_t prefix = 0;
    for (int digit = 0; digit < kDigits; ++digit) {
      EXPECT_TRUE(HasPrefix(key, prefix, digit));
      if (digit > 0) {
        EXPECT_FALSE(HasPrefix(key ^ 1U << DigitShift(digit - 1), prefix, digit));
      }
      ASSERT_LT(DigitOf(key, digit), static_cast<uint32_t>(DigitBins(digit)));
      prefix |= DigitOf(key, digit) << DigitShift(digit);
    }
    EXPECT_EQ(prefix, key);
  }
}

TEST_F(CudaSelectTest, SlicesAreTheWholeRow) {
  for (const int64_t tokens :
       {int64_t{1}, int64_t{512}, int64_t{513}, int64_t{2049}, int64_t{131072}, kMaxTokens}) {
    for (const int ranks : {1, 2, 4, 8}) {
      int64_t next = 0;
      for (int r = 0; r < ranks; ++r) {
        const Slice slice = SliceOf(tokens, r, ranks);
        EXPECT_EQ(slice.first_tile, next);
        EXPECT_LE(slice.tiles, SliceOf(tokens, 0, ranks).tiles);
        next += slice.tiles;
      }
      EXPECT_EQ(next, Tiles(tokens));
    }
  }
}

TEST_F(CudaSelectTest, KeepsTheBestAndTheWindow) {
  for (const int64_t tokens : {1, 2, 8, 9, 31, 33, 511, 512, 513, 1025, 2049}) {
    ExpectAllBudgets(Scores(tokens, 4100 + static_cast<uint64_t>(tokens)));
  }
}

TEST_F(CudaSelectTest, TiesGoToTheLowerPosition) {
  for (const int64_t tokens : {17, 1000, 2049}) {
    ExpectAllBudgets(std::vector<float>(static_cast<size_t>(tokens), 0.25F));
    std::vector<float> few = Scores(tokens, static_cast<uint64_t>(tokens));
    for (float& s : few) s = std::ceil(std::log2(s)) / 16.0F;
    ExpectAllBudgets(few);
    for (float& s : few) s = random_() % 2 == 0 ? -0.0F : 0.0F;
    ExpectAllBudgets(few);
  }
}

TEST_F(CudaSelectTest, OrdersEveryKindOfNumber) {
  std::vector<float> scores = Scores(3000, 5);
  for (size_t j = 0; j < scores.size(); ++j) {
    if (j % 7 == 1) scores[j] = -scores[j];
    if (j % 11 == 2) scores[j] = 0.0F;
    if (j % 13 == 3) scores[j] = std::numeric_limits<float>::denorm_min() * static_cast<float>(j);
    if (j % 101 == 4) scores[j] = kLargestFloat;
    if (j % 103 == 5) scores[j] = -kLargestFloat;
  }
  ExpectAllBudgets(scores);
  float value = 1.0F;
  for (float& s : scores) s = value = std::nextafter(value, 0.0F);
  ExpectAllBudgets(scores);
}

// As on the device: whole blocks, and a layer's length.
TEST_F(CudaSelectTest, SelectsOfALongRow) {
  const std::vector<float> scores = Scores(131072, 6);
  ExpectSelected({true, kMaxClusterBlocks, kClusterThreads}, scores, 8, 13108);
  ExpectSelected({false, 5, kGlobalThreads}, scores, 8, 13108);
}

TEST_F(CudaSelectTest, SelectsOfManyRowsAtOnce) {
  const std::vector<int64_t> lengths = {700, 1, 2049, 33, 512};
  for (const bool cluster : {true, false}) {
    std::vector<std::vector<float>> scores;
    std::vector<std::vector<int32_t>> want;
    std::vector<std::vector<int32_t>> got;
    std::vector<SelectRow> rows;
    for (const int64_t tokens : lengths) {
      scores.push_back(Scores(tokens, 4600 + static_cast<uint64_t>(tokens)));
      const int64_t keep = (tokens + 1) / 2;
      want.emplace_back(static_cast<size_t>(keep));
      got.emplace_back(static_cast<size_t>(keep));
      reference_->Select({scores.back().data(), tokens, 1, keep}, want.back().data());
      rows.push_back({.scores = scores.back().data(),
                      .tokens = tokens,
                      .positions = got.back().data(),
                      .window = 1,
                      .keep = keep});
    }
    RunCudaSelect({cluster, 2, 64}, rows);
    EXPECT_EQ(got, want);
  }
}

TEST_F(CudaSelectTest, SumsAreTheReferencesAndTheSameEachWay) {
  for (const int64_t tokens : {1, 33, 512, 513, 2049}) {
    std::vector<float> scores = Scores(tokens, 4200 + static_cast<uint64_t>(tokens));
    scores[static_cast<size_t>(tokens) / 2] = 0.0F;
    if (tokens > 600) scores[600] = scores[100];
    ExpectSums(scores);
  }
}

// The two cuts share digits, all or some.
TEST_F(CudaSelectTest, SumsOfScoresThatAreAlike) {
  constexpr int64_t kTokens = 1500;
  ExpectSums(std::vector<float>(kTokens, 0.25F));
  ExpectSums(std::vector<float>(kTokens, 0.0F));
  for (const auto values : {uint64_t{3}, uint64_t{4096}}) {
    std::vector<float> scores(kTokens);
    for (float& s : scores) s = 1.0F + 0x1p-20F * static_cast<float>(random_() % values);
    ExpectSums(scores);
  }
}

TEST_F(CudaSelectTest, StatisticsAreTheReferences) {
  constexpr int64_t kHeads = 5;
  for (const int64_t tokens : {1, 127, 512, 513, 1500}) {
    std::vector<float> values = Scores(kHeads * tokens, 4300 + static_cast<uint64_t>(tokens));
    values[0] = -0.0F;
    const std::vector<float> before = Scores(tokens, 4400);
    for (const bool spoilt : {false, true}) {
      if (spoilt) {
        values[static_cast<size_t>(2 * tokens + tokens / 2)] = -1e-30F;
        values[static_cast<size_t>(1 * tokens + tokens / 2)] =
            std::numeric_limits<float>::quiet_NaN();
        values[static_cast<size_t>(tokens - 1)] = std::numeric_limits<float>::infinity();
      }
      std::vector<float> sum(static_cast<size_t>(tokens));
      std::vector<float> centrality = before;
      uint64_t bad = kNoBad;
      RunCudaStatistics({.values = values.data(),
                         .heads = kHeads,
                         .tokens = tokens,
                         .sum = sum.data(),
                         .centrality = centrality.data(),
                         .decay = 0.9F,
                         .bad = &bad});
      const auto want = reference_->FindBad(values.data(), kHeads, tokens, SerialFor);
      ASSERT_EQ(want.has_value(), bad != kNoBad);
      if (want) {
        EXPECT_EQ(PlaceToken(bad), want->token);
        EXPECT_EQ(PlaceHead(bad), want->head);
        continue;
      }
      for (int64_t j = 0; j < tokens; ++j) {
        float in_order = values[j];
        for (int64_t h = 1; h < kHeads; ++h) in_order += values[h * tokens + j];
        ASSERT_EQ(sum[j], in_order);
        ASSERT_EQ(centrality[j], std::fma(0.9F, before[j], in_order));
      }
    }
  }
}

TEST_F(CudaSelectTest, PoolsAsTheReference) {
  constexpr int64_t kRows = 3;
  for (const int64_t tokens : {1, 2, 33, 100, 600}) {
    const std::vector<float> in = Scores(kRows * tokens, 4500);
    std::vector<float> want(in.size());
    std::vector<float> got(in.size());
    for (const int64_t kernel : {1, 3, 7, 63}) {
      for (const Smoothing smoothing : {Smoothing::kNone, Smoothing::kMean, Smoothing::kMaximum}) {
        const Pooling pooling = smoothing == Smoothing::kNone   ? Pooling::kNone
                                : smoothing == Smoothing::kMean ? Pooling::kAvg
                                                                : Pooling::kMax;
        for (int64_t r = 0; r < kRows; ++r) {
          reference_->Pool(in.data() + r * tokens, tokens, pooling, kernel,
                           want.data() + r * tokens);
        }
        RunCudaPool({.in = in.data(),
                     .out = got.data(),
                     .rows = kRows,
                     .tokens = tokens,
                     .row_stride = tokens,
                     .smoothing = smoothing,
                     .kernel = kernel});
        const double bound =
            smoothing == Smoothing::kMean ? static_cast<double>(kernel) * 1.2e-7 : 0.0;
        for (size_t j = 0; j < in.size(); ++j) EXPECT_NEAR(got[j], want[j], bound * want[j]);
      }
    }
  }
}

TEST_F(CudaSelectTest, RunsTakeWhatFits) {
  const SelectLimits h100 = {8, 227 << 10, 132};
  const SelectLimits a100 = {1, 163 << 10, 108};
  const float score = 0;
  const auto row = [&](int64_t tokens) { return SelectRow{.scores = &score, .tokens = tokens}; };
  EXPECT_EQ(ClusterBlocks(row(1), h100), 1);
  EXPECT_EQ(ClusterBlocks(row(131072), h100), 8);
  EXPECT_EQ(ClusterBlocks(row(350000), h100), 8);
  EXPECT_EQ(ClusterBlocks(row(1 << 20), h100), 0);
  EXPECT_EQ(ClusterBlocks(row(8192), a100), 1);
  EXPECT_EQ(ClusterBlocks(row(131072), a100), 0);
  for (const SelectLimits& limits : {h100, a100, SelectLimits{1, 1 << 10, 1}}) {
    for (const int64_t tokens : {int64_t{1}, int64_t{30000}, int64_t{131072}, int64_t{400000}}) {
      const int blocks = ClusterBlocks(row(tokens), limits);
      if (blocks > 0) {
        EXPECT_LE(ClusterSharedBytes(SliceOf(tokens, 0, blocks).tiles), limits.shared_bytes);
      }
    }
  }
  const std::vector<SelectRow> rows = {row(100), row(131072), row(1 << 20), row(1 << 21), row(5)};
  const SelectRun first = NextRun(rows.data(), 5, h100);
  EXPECT_EQ(first.rows, 2);
  EXPECT_EQ(first.cluster_blocks, 8);
  EXPECT_EQ(first.state_bytes, 0);
  const SelectRun second = NextRun(rows.data() + 2, 3, h100);
  EXPECT_EQ(second.rows, 2);
  EXPECT_EQ(second.cluster_blocks, 0);
  EXPECT_EQ(second.state_bytes, GlobalStateBytes(1 << 20) + GlobalStateBytes(1 << 21));
  const std::vector<SelectRow> many(kSelectRows + 1, row(9));
  EXPECT_EQ(NextRun(many.data(), kSelectRows + 1, h100).rows, kSelectRows);
}

}  // namespace
}  // namespace structkv::cuda
