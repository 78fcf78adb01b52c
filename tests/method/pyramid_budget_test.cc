#include "service/method/pyramid_budget.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/method/budget.h"

namespace structkv::method {
namespace {

using ::testing::ElementsAre;

std::vector<int64_t> Budgets(const MethodSpec& spec, int64_t tokens, int64_t layers) {
  std::vector<int64_t> budgets;
  for (int64_t l = 0; l < layers; ++l) budgets.push_back(PyramidTokens(spec, tokens, l, layers));
  return budgets;
}

MethodSpec Pyramid(double ratio, int64_t window, double beta) {
  MethodSpec spec = MethodSpec::Defaults(Method::kPyramidKv);
  spec.kv_budget.ratio = ratio;
  spec.window = window;
  spec.beta = beta;
  return spec;
}

// k = 60, m = 50: from 2 m - m / 5 = 90 down to m / 5 = 10 in steps of 20, and the window of 10.
TEST(PyramidBudgetTest, FallsLinearlyFromTopToBottom) {
  EXPECT_THAT(Budgets(Pyramid(0.06, 10, 5), 1000, 5), ElementsAre(100, 80, 60, 40, 20));
}

// k = 100, m = 68: 132.6 .. 3.4 in steps of 43.0667 is 132.6, 89.533, 46.467, 3.4.
TEST(PyramidBudgetTest, WhatRoundingLeavesGoesToTheFirstLayers) {
  EXPECT_THAT(Budgets(Pyramid(0.1, 32, 20), 1000, 4), ElementsAre(165, 122, 78, 35));
}

// m = 60 of N - w = 90: the top of 117 does not exist; 90 at the top leaves 30 at the bottom.
TEST(PyramidBudgetTest, NoLayerKeepsMoreThanThereIs) {
  EXPECT_THAT(Budgets(Pyramid(0.7, 10, 20), 100, 3), ElementsAre(100, 70, 40));
}

TEST(PyramidBudgetTest, BetaOfOneIsFlatAndSoIsOneLayer) {
  EXPECT_THAT(Budgets(Pyramid(0.1, 8, 1), 1000, 3), ElementsAre(100, 100, 100));
  EXPECT_THAT(Budgets(Pyramid(0.1, 8, 20), 1000, 1), ElementsAre(100));
}

TEST(PyramidBudgetTest, TotalsAreExactAndNoLayerExceedsTheOneBefore) {
  for (const BudgetKind kind : {BudgetKind::kIncludesWindow, BudgetKind::kWindowOnTop}) {
    for (const double beta : {1.0, 1.5, 7.0, 20.0, 1e9}) {
      for (const double ratio : {1e-6, 0.01, 0.1, 0.37, 0.5, 0.93, 1.0}) {
        for (const int64_t layers : {1, 2, 3, 12, 33, 80}) {
          for (const int64_t tokens : {1, 7, 8, 9, 50, 211, 1000, 131072}) {
            MethodSpec spec = Pyramid(ratio, 8, beta);
            spec.kv_budget.kind = kind;
            const std::vector<int64_t> budgets = Budgets(spec, tokens, layers);
            int64_t total = 0;
            for (int64_t l = 0; l < layers; ++l) {
              total += budgets[l];
              EXPECT_GE(budgets[l], WindowRows(spec, tokens));
              EXPECT_LE(budgets[l], l == 0 ? tokens : budgets[l - 1]);
            }
            EXPECT_EQ(total, layers * KeptTokens(spec, tokens))
                << "ratio " << ratio << ", beta " << beta << ", " << layers << " layers, " << tokens
                << " tokens";
            EXPECT_EQ(LargestKeptTokens(spec, tokens, layers), budgets[0]);
          }
        }
      }
    }
  }
}

// m = 125 tokens, the window among them: 243.75 down to 6.25 would leave less than the window of 8
// at the bottom, so that every layer keeps m; with a window of 4 it stands.
TEST(PyramidBudgetTest, KvpressCountsTheWindowAndRoundsEachLayer) {
  MethodSpec spec = Pyramid(0.125, 8, 20);
  spec.kv_budget.kind = BudgetKind::kKvpress;
  EXPECT_THAT(Budgets(spec, 1000, 3), ElementsAre(125, 125, 125));
  spec.window = 4;
  EXPECT_THAT(Budgets(spec, 1000, 3), ElementsAre(244, 125, 6));
  // 96 and 4 in steps of 46: halves go to the even number, 4 + 46 / 2 is none here.
  spec.beta = 25;
  spec.kv_budget.ratio = 0.1;
  EXPECT_THAT(Budgets(spec, 1000, 3), ElementsAre(196, 100, 4));
  EXPECT_EQ(LargestKeptTokens(spec, 1000, 3), 196);
}

}  // namespace
}  // namespace structkv::method
