#include "service/method/centrality.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "kernels/resident_vectors.h"

namespace structkv::method {
namespace {

using ::testing::ElementsAre;

class CentralityTest : public ::testing::Test {
 protected:
  Centrality Make(double decay, int64_t tokens, int64_t first, int64_t last) const {
    return {decay, first, last, HostVectors(Centrality::MaxVectors(last), tokens, *backend_)};
  }
  static void Add(Centrality& centrality, int64_t layer, const std::vector<float>& saliency) {
    EXPECT_EQ(centrality.Add(layer, saliency, SerialFor), absl::OkStatus());
  }
  // C(layer).
  static std::vector<float> Take(Centrality& centrality, int64_t layer, int64_t tokens) {
    std::vector<float> taken(static_cast<size_t>(tokens));
    EXPECT_EQ(centrality.Finish(layer, SerialFor), absl::OkStatus());
    EXPECT_EQ(centrality.Read(taken.data()), absl::OkStatus());
    return taken;
  }

  std::unique_ptr<Backend> backend_ = *CreateBackend("reference");
};

TEST_F(CentralityTest, ByHand) {
  Centrality centrality = Make(0.5, 2, 2, 2);
  Add(centrality, 0, {4.0F, 0.0F});
  Add(centrality, 1, {2.0F, 2.0F});
  Add(centrality, 2, {1.0F, 8.0F});
  // 4/4 + 2/2 + 1, 0 + 2/2 + 8
  EXPECT_THAT(Take(centrality, 2, 2), ElementsAre(3.0F, 9.0F));
}

TEST_F(CentralityTest, DecayOfOneAddsAndOfNoneKeepsThePivotAlone) {
  for (const double decay : {0.0, 1.0}) {
    Centrality centrality = Make(decay, 1, 0, 2);
    for (int64_t layer = 0; layer < 3; ++layer) Add(centrality, layer, {5.0F});
    EXPECT_THAT(Take(centrality, 2, 1), ElementsAre(decay == 1.0 ? 15.0F : 5.0F));
  }
}

TEST_F(CentralityTest, LayersPastThePivotDoNotCount) {
  Centrality centrality = Make(0.9, 1, 0, 3);
  for (int64_t layer = 0; layer < 6; ++layer) {
    Add(centrality, layer, {static_cast<float>(layer + 1)});
  }
  EXPECT_EQ(centrality.vectors(), 4);
  EXPECT_THAT(Take(centrality, 0, 1), ElementsAre(1.0F));
  EXPECT_EQ(centrality.vectors(), 1);
}

TEST_F(CentralityTest, LayersInOrderUpToTheFirstPivotTakeOneVector) {
  Centrality centrality = Make(0.9, 3, 10, 12);
  for (int64_t layer = 0; layer <= 10; ++layer) {
    Add(centrality, layer, {1.0F, 2.0F, 3.0F});
    EXPECT_EQ(centrality.vectors(), 1);
  }
}

TEST_F(CentralityTest, WhatNoDecisionNeedsIsSummedUpAsItComes) {
  Centrality centrality = Make(0.5, 1, 1, 6);
  for (const int64_t layer : {2, 0, 1, 3}) {
    Add(centrality, layer, {static_cast<float>(layer + 1)});
  }
  EXPECT_EQ(centrality.vectors(), 3) << "C(1), and layers 2 and 3";
  ASSERT_EQ(centrality.NotBelow(3, SerialFor), absl::OkStatus());
  EXPECT_EQ(centrality.vectors(), 1);
  ASSERT_EQ(centrality.NotBelow(4, SerialFor), absl::OkStatus());
  Add(centrality, 4, {5.0F});
  EXPECT_EQ(centrality.vectors(), 1);
  EXPECT_THAT(Take(centrality, 4, 1),
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
      Centrality centrality = Make(0.9, kTokens, kFirst, kLast);
      for (const int64_t layer : order) {
        Add(centrality, layer, saliency[layer]);
        EXPECT_LE(centrality.vectors(), Centrality::MaxVectors(kLast));
      }
      const std::vector<float> got = Take(centrality, pivot, kTokens);
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
