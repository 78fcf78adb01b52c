#include "service/method/budget.h"

#include <algorithm>

#include "gtest/gtest.h"

namespace structkv::method {
namespace {

TEST(BudgetTest, ATenthOfAThousandIsAHundred) {
  EXPECT_EQ(ShareOfTokens(0.1, 1000), 100);
  EXPECT_EQ(KeptTokens(MethodSpec::Defaults(Method::kStructKv), 1000), 100);
  EXPECT_EQ(KeptTokens(MethodSpec::Defaults(Method::kSnapKv), 1000), 100);
  EXPECT_EQ(SkeletonTokens(MethodSpec::Defaults(Method::kStructKv), 1000), 200);
}

TEST(BudgetTest, SharesRoundUp) {
  EXPECT_EQ(ShareOfTokens(0.1, 1001), 101);
  EXPECT_EQ(ShareOfTokens(0.1, 131072), 13108);
  EXPECT_EQ(ShareOfTokens(1.0, 7), 7);
  EXPECT_EQ(ShareOfTokens(1e-12, 1), 0);
}

// Every decimal ratio of two places, of every multiple of a hundred: exactly what was meant.
TEST(BudgetTest, DecimalRatiosAreExact) {
  for (int64_t percent = 1; percent <= 100; ++percent) {
    for (int64_t tokens = 100; tokens <= 100'000; tokens += 700) {
      const double ratio = static_cast<double>(percent) / 100.0;
      EXPECT_EQ(ShareOfTokens(ratio, tokens), percent * tokens / 100)
          << percent << " of " << tokens;
    }
  }
}

TEST(BudgetTest, TheWindowIsPartOfTheBudget) {
  const Budget tenth{.ratio = 0.1};
  EXPECT_EQ(BudgetTokens(tenth, 8, 1000), 100);
  EXPECT_EQ(BudgetTokens(tenth, 8, 50), 8);  // 5 would not hold the window
  EXPECT_EQ(BudgetTokens(tenth, 5, 5), 5);   // a prompt shorter than the window
  EXPECT_EQ(BudgetTokens(tenth, 1, 1), 1);
  EXPECT_EQ(BudgetTokens({.ratio = 1.0}, 8, 50), 50);
}

TEST(BudgetTest, TheWindowOnTop) {
  const Budget tenth{.ratio = 0.1, .kind = BudgetKind::kWindowOnTop};
  EXPECT_EQ(BudgetTokens(tenth, 8, 1000), 108);
  EXPECT_EQ(BudgetTokens(tenth, 8, 50), 13);
  EXPECT_EQ(BudgetTokens(tenth, 8, 8), 8);
  EXPECT_EQ(BudgetTokens({.ratio = 1.0, .kind = BudgetKind::kWindowOnTop}, 8, 50), 50);
}

TEST(BudgetTest, CountsLieBetweenTheWindowAndThePrompt) {
  for (const BudgetKind kind : {BudgetKind::kIncludesWindow, BudgetKind::kWindowOnTop}) {
    MethodSpec spec = MethodSpec::Defaults(Method::kStructKv);
    spec.kv_budget.kind = kind;
    spec.skeleton_budget.kind = kind;
    for (const double ratio : {1e-15, 0.001, 0.1, 0.5, 0.999, 1.0}) {
      spec.kv_budget.ratio = ratio;
      spec.skeleton_budget.ratio = ratio;
      for (int64_t tokens = 1; tokens < 200; ++tokens) {
        const int64_t window = WindowRows(spec, tokens);
        EXPECT_EQ(window, std::min<int64_t>(8, tokens));
        EXPECT_GE(KeptTokens(spec, tokens), window);
        EXPECT_LE(KeptTokens(spec, tokens), tokens);
        EXPECT_EQ(SkeletonTokens(spec, tokens), KeptTokens(spec, tokens));
      }
    }
  }
}

TEST(BudgetTest, StreamingLlmKeepsItsSinksAndAtLeastOneToken) {
  MethodSpec spec = MethodSpec::Defaults(Method::kStreamingLlm);
  EXPECT_EQ(KeptTokens(spec, 1000), 100);
  EXPECT_EQ(KeptTokens(spec, 20), 4);
  EXPECT_EQ(KeptTokens(spec, 3), 3);
  EXPECT_EQ(KeptTokens(spec, 1), 1);
  EXPECT_EQ(WindowRows(spec, 1000), 0);
  EXPECT_EQ(SkeletonTokens(spec, 1000), 0);
  spec.sink_tokens = 0;
  spec.kv_budget.ratio = 1e-12;
  EXPECT_EQ(KeptTokens(spec, 1), 1);
}

// int(1000 * (1 - 0.9)) is 99 in double precision, and so it is here.
TEST(BudgetTest, KvpressRoundsTheProductDown) {
  const Budget budget{.ratio = 1 - 0.9, .kind = BudgetKind::kKvpress};
  EXPECT_EQ(BudgetTokens(budget, 8, 1000), 99);
  EXPECT_EQ(BudgetTokens({.ratio = 0.1, .kind = BudgetKind::kKvpress}, 8, 1009), 100);
  EXPECT_EQ(BudgetTokens(budget, 8, 50), 8);
  EXPECT_EQ(BudgetTokens(budget, 0, 5), 1);
  EXPECT_EQ(BudgetTokens({.ratio = 1, .kind = BudgetKind::kKvpress}, 8, 50), 50);
}

TEST(BudgetTest, GemFilterKeepsTokensInItsLayerAlone) {
  MethodSpec spec = MethodSpec::Defaults(Method::kGemFilter);
  spec.filter_layer = 2;
  EXPECT_EQ(KeptTokens(spec, 1000, 1, 4), 0);
  EXPECT_EQ(KeptTokens(spec, 1000, 2, 4), 100);
  EXPECT_EQ(KeptTokens(spec, 1000, 3, 4), 0);
  EXPECT_EQ(LargestKeptTokens(spec, 1000, 4), 100);
  EXPECT_EQ(SkeletonTokens(spec, 1000), 100);
}

TEST(BudgetTest, FastKvHasASkeleton) {
  const MethodSpec spec = MethodSpec::Defaults(Method::kFastKv);
  EXPECT_EQ(KeptTokens(spec, 1000, 0, 4), 100);
  EXPECT_EQ(SkeletonTokens(spec, 1000), 200);
  EXPECT_EQ(SkeletonTokens(MethodSpec::Defaults(Method::kPyramidKv), 1000), 0);
  EXPECT_EQ(SkeletonTokens(MethodSpec::Defaults(Method::kH2o), 1000), 0);
}

TEST(BudgetTest, TheRecentShareIsRoundedDown) {
  MethodSpec spec = MethodSpec::Defaults(Method::kH2o);
  EXPECT_EQ(WindowRows(spec, 1000), 0);
  EXPECT_EQ(RecentTokens(spec, 101), 50);
  spec.recent_share = 0.1;
  EXPECT_EQ(RecentTokens(spec, 30), 3) << "whatever the rounding of 0.1";
  spec.recent_share = 0;
  EXPECT_EQ(RecentTokens(spec, 100), 0);
  spec.recent_share = 1;
  EXPECT_EQ(RecentTokens(spec, 100), 100);
}

TEST(BudgetTest, FullKeepsEverything) {
  MethodSpec spec = MethodSpec::Defaults(Method::kFull);
  spec.kv_budget.ratio = 0.1;  // has no meaning here
  EXPECT_EQ(KeptTokens(spec, 1000), 1000);
  EXPECT_EQ(SkeletonTokens(spec, 1000), 0);
}

}  // namespace
}  // namespace structkv::method
