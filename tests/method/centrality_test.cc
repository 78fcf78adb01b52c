#include "service/method/centrality.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"

namespace structkv::method {
namespace {

using ::testing::ElementsAre;

class CentralityTest : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = *CreateBackend("reference");
};

TEST_F(CentralityTest, ByHand) {
  Centrality centrality(0.5, 2, 2, 2, backend_.get());
  centrality.Add(0, {4.0F, 0.0F}, SerialFor);
  centrality.Add(1, {2.0F, 2.0F}, SerialFor);
  centrality.Add(2, {1.0F, 8.0F}, SerialFor);
  // 4/4 + 2/2 + 1, 0 + 2/2 + 8
  EXPECT_THAT(centrality.Take(2, SerialFor), ElementsAre(3.0F, 9.0F));
}

TEST_F(CentralityTest, DecayOfOneAddsAndOfNoneKeepsThePivotAlone) {
  for (const double decay : {0.0, 1.0}) {
    Centrality centrality(decay, 1, 0, 2, backend_.get());
    for (int64_t layer = 0; layer < 3; ++layer) centrality.Add(layer, {5.0F}, SerialFor);
    EXPECT_THAT(centrality.Take(2, SerialFor), ElementsAre(decay == 1.0 ? 15.0F : 5.0F));
  }
}

TEST_F(CentralityTest, LayersPastThePivotDoNotCount) {
  Centrality centrality(0.9, 1, 0, 3, backend_.get());
  for (int64_t layer = 0; layer < 6; ++layer) {
    centrality.Add(layer, {static_cast<float>(layer + 1)}, SerialFor);
  }
  EXPECT_EQ(centrality.vectors(), 4);
  EXPECT_THAT(centrality.Take(0, SerialFor), ElementsAre(1.0F));
  EXPECT_EQ(centrality.vectors(), 0);
}

TEST_F(CentralityTest, LayersInOrderUpToTheFirstPivotTakeOneVector) {
  Centrality centrality(0.9, 3, 10, 12, backend_.get());
  for (int64_t layer = 0; layer <= 10; ++layer) {
    centrality.Add(layer, {1.0F, 2.0F, 3.0F}, SerialFor);
    EXPECT_EQ(centrality.vectors(), 1);
  }
}

TEST_F(CentralityTest, WhatNoDecisionNeedsIsSummedUpAsItComes) {
  Centrality centrality(0.5, 1, 1, 6, backend_.get());
  for (const int64_t layer : {2, 0, 1, 3}) {
    centrality.Add(layer, {static_cast<float>(layer + 1)}, SerialFor);
  }
  EXPECT_EQ(centrality.vectors(), 3) << "C(1), and layers 2 and 3";
  centrality.NotBelow(3, SerialFor);
  EXPECT_EQ(centrality.vectors(), 1);
  centrality.NotBelow(4, SerialFor);
  centrality.Add(4, {5.0F}, SerialFor);
  EXPECT_EQ(centrality.vectors(), 1);
  EXPECT_THAT(centrality.Take(4, SerialFor),
              ElementsAre(5.0F + 4 * 0.5F + 3 * 0.25F + 2 * 0.125F + 0.0625F));
}

// Any order of arrival gives the same bits as ascending order, for every possible pivot.
TEST_F(CentralityTest, OrderOfArrivalLeavesNoTrace) {
  constexpr int64_t kLayers = 12;
  constexpr int64_t kFirst = 4;
  constexpr int64_t kLast = 10;
  constexpr size_t kTokens = 31;
  std::mt19937 random(20260404);
  std::uniform_real_distribution<float> uniform(0.0F, 1.0F);
  std::vector<std::vector<float>> saliency(kLayers, std::vector<float>(kTokens));
  for (auto& layer : saliency)
    std::generate(layer.begin(), layer.end(), [&] { return uniform(random); });

  std::vector<int64_t> order(kLayers);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t pivot = kFirst; pivot <= kLast; ++pivot) {
    std::sort(order.begin(), order.end());
    std::vector<float> expected;
    for (int round = 0; round < 6; ++round) {
      Centrality centrality(0.9, kTokens, kFirst, kLast, backend_.get());
      for (const int64_t layer : order) {
        centrality.Add(layer, saliency[layer], SerialFor);
        EXPECT_LE(centrality.vectors(), Centrality::MaxVectors(kLast));
      }
      const std::vector<float> got = centrality.Take(pivot, SerialFor);
      if (round == 0) expected = got;
      EXPECT_EQ(got, expected) << "pivot " << pivot << ", round " << round;
      std::shuffle(order.begin(), order.end(), random);
    }
    for (size_t j = 0; j < kTokens; ++j) {
      double sum = 0;
      for (int64_t layer = 0; layer <= pivot; ++layer) sum = 0.9 * sum + saliency[layer][j];
      EXPECT_NEAR(expected[j], sum, 1e-5);
    }
  }
}

}  // namespace
}  // namespace structkv::method
