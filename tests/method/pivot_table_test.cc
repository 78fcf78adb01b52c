// Where EXACT, ONLINE and FIXED answer, and how late: on the bundled prompt and on profiles whose
// transition is known. Prints the table of docs/method.md.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "client/cli/capture.h"
#include "client/cli/compressor.h"
#include "client/cli/in_process.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/method/pivot_detector.h"

namespace structkv::method {
namespace {

constexpr int64_t kLayers = 32;

// Metrics of a layer whose attention is concentrated to a degree, from 0 to 1.
std::vector<LayerMetrics> FromConcentration(const std::vector<double>& concentration) {
  std::vector<LayerMetrics> metrics;
  for (const double c : concentration) {
    metrics.push_back(
        {.entropy = 7 - 3 * c, .sparsity = 0.3 + 0.5 * c, .variance = 5 + 40 * c * c});
  }
  // Attention sinks form in the first layers.
  metrics[0] = {.entropy = 4.9, .sparsity = 0.65, .variance = 24.6};
  metrics[1] = {.entropy = 5.8, .sparsity = 0.5, .variance = 11.4};
  return metrics;
}

// Concentration 0.1, and `level` from layer `at` on.
std::vector<double> Step(int64_t at, double level) {
  std::vector<double> profile(kLayers, 0.1);
  std::fill(profile.begin() + at, profile.end(), level);
  return profile;
}

// Uniform in [-1, 1), the same everywhere (SplitMix64).
double Noise(uint64_t index) {
  uint64_t z = index + 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  z ^= z >> 31;
  return (static_cast<double>(z >> 40) / static_cast<double>(1 << 24) - 0.5) * 2;
}

std::vector<LayerMetrics> TwoPeaks() {
  std::vector<double> profile = Step(11, 0.45);
  std::fill(profile.begin() + 14, profile.end(), 0.2);
  std::fill(profile.begin() + 20, profile.end(), 0.8);
  return FromConcentration(profile);
}

std::vector<LayerMetrics> Noisy() {
  std::vector<double> profile = Step(16, 0.6);
  for (size_t l = 0; l < profile.size(); ++l) profile[l] += 0.06 * Noise(l);
  return FromConcentration(profile);
}

std::vector<LayerMetrics> Slope() {
  std::vector<double> profile = Step(10, 0.1);
  for (int64_t l = 11; l < kLayers; ++l) {
    profile[l] = 0.1 + 0.5 * std::min(1.0, static_cast<double>(l - 10) / 8);
  }
  return FromConcentration(profile);
}

// What the engine measures on the bundled prompt.
std::vector<LayerMetrics> BundledPrompt() {
  auto capture = cli::Capture::Open(STRUCTKV_TEST_DATA "/capture-tiny-llama-1000.safetensors");
  EXPECT_TRUE(capture.ok()) << capture.status();
  auto compressor = cli::MakeInProcessCompressor("cpu", 1);
  EXPECT_TRUE(compressor.ok()) << compressor.status();
  if (!capture.ok() || !compressor.ok()) return {};
  v1::Opened opened;
  client::SessionOptions options;
  options.on_opened = [&](const v1::Opened& o) { opened = o; };
  v1::Open open = capture->MakeOpen();
  open.set_statistic(capture->statistic());
  open.set_output(v1::OUTPUT_PLAN);
  const auto result =
      (*compressor)
          ->Collect(
              open, [&](uint32_t layer) { return capture->Layer(layer, opened); }, options);
  EXPECT_TRUE(result.ok()) << result.status();
  std::vector<LayerMetrics> metrics;
  if (!result.ok()) return metrics;
  for (const client::LayerResult& layer : result->layers) {
    const v1::LayerMetrics& m = layer.metrics.value();
    metrics.push_back({m.entropy(), m.sparsity(), m.variance()});
  }
  return metrics;
}

PivotDecision Decide(const std::vector<LayerMetrics>& metrics, const PivotSpec& spec) {
  const auto layers = static_cast<int64_t>(metrics.size());
  for (size_t seen = 1; seen <= metrics.size(); ++seen) {
    auto decision = DecideAfter(absl::MakeConstSpan(metrics.data(), seen), layers, spec);
    if (decision.has_value()) return *std::move(decision);
  }
  ADD_FAILURE() << "no decision";
  return {};
}

PivotDecision Decide(const std::vector<LayerMetrics>& metrics, PivotMode mode) {
  PivotSpec spec;
  spec.mode = mode;
  spec.fixed_layer = static_cast<int64_t>(metrics.size()) / 2;
  return Decide(metrics, spec);
}

struct Row {
  std::string name;
  std::vector<LayerMetrics> metrics;
  int64_t exact, online, online_at, online_full;
};

std::vector<Row> Rows() {
  return {
      {"bundled prompt", BundledPrompt(), 10, 10, 9, 11},
      {"early", FromConcentration(Step(9, 0.6)), 10, 10, 11, 12},
      {"middle", FromConcentration(Step(16, 0.6)), 17, 17, 18, 19},
      {"late", FromConcentration(Step(22, 0.6)), 23, 23, 24, 25},
      {"slope", Slope(), 19, 19, 24, 25},
      {"two peaks", TwoPeaks(), 21, 12, 13, 14},
      {"flat", FromConcentration(Step(2, 0.1)), 9, 9, 24, 25},
      {"noisy", Noisy(), 17, 17, 18, 19},
  };
}

// Full layers before skeleton rows may come.
int64_t FullLayers(const PivotDecision& decision, const Row& row) {
  return decision.skeleton_from_layer.value_or(static_cast<int64_t>(row.metrics.size()));
}

TEST(PivotTableTest, WhereEachModeAnswers) {
  std::printf(
      "| profile | layers | EXACT: L*, known after | ONLINE: L*, known after, full layers "
      "| FIXED (half): L*, full layers |\n|---|---|---|---|---|\n");
  for (const Row& row : Rows()) {
    SCOPED_TRACE(row.name);
    ASSERT_GE(row.metrics.size(), 12U);
    const auto layers = static_cast<int64_t>(row.metrics.size());
    const PivotDecision exact = Decide(row.metrics, PivotMode::kExact);
    const PivotDecision online = Decide(row.metrics, PivotMode::kOnline);
    const PivotDecision fixed = Decide(row.metrics, PivotMode::kFixed);
    std::printf("| %s | %ld | %ld, %ld | %ld, %ld, %ld | %ld, %ld |\n", row.name.c_str(), layers,
                exact.pivot_layer, exact.decided_at_layer, online.pivot_layer,
                online.decided_at_layer, FullLayers(online, row), fixed.pivot_layer,
                FullLayers(fixed, row));
    EXPECT_EQ(exact.pivot_layer, row.exact);
    EXPECT_EQ(exact.decided_at_layer, layers - 1);
    EXPECT_EQ(exact.skeleton_from_layer, std::nullopt);
    EXPECT_EQ(online.pivot_layer, row.online);
    EXPECT_EQ(online.decided_at_layer, row.online_at);
    EXPECT_EQ(FullLayers(online, row), row.online_full);
    EXPECT_EQ(online.layers.size(), static_cast<size_t>(online.decided_at_layer) + 1);
    EXPECT_EQ(fixed.pivot_layer, layers / 2);
    EXPECT_EQ(fixed.decided_at_layer, layers / 2);
    EXPECT_EQ(FullLayers(fixed, row), layers / 2 + 1);
  }
}

TEST(OnlinePivotTest, WithAllThePatienceItIsExact) {
  for (const Row& row : Rows()) {
    SCOPED_TRACE(row.name);
    PivotSpec spec;
    spec.mode = PivotMode::kOnline;
    spec.patience = 1000;
    spec.deadline = 1.0;
    const PivotDecision online = Decide(row.metrics, spec);
    EXPECT_EQ(online.pivot_layer, row.exact);
    EXPECT_EQ(online.decided_at_layer, static_cast<int64_t>(row.metrics.size()) - 1);
    EXPECT_EQ(online.skeleton_from_layer, std::nullopt);
  }
}

TEST(OnlinePivotTest, PatienceDelaysTheAnswer) {
  const auto metrics = FromConcentration(Step(10, 0.6));
  for (int64_t patience = 1; patience <= 20; ++patience) {
    PivotSpec spec;
    spec.mode = PivotMode::kOnline;
    spec.patience = patience;
    const PivotDecision online = Decide(metrics, spec);
    EXPECT_EQ(online.transition_layer, 10);
    EXPECT_EQ(online.decided_at_layer, std::min<int64_t>(10 + patience, 24)) << patience;
  }
}

TEST(OnlinePivotTest, TheDeadlineForcesTheBestSoFar) {
  const auto metrics = FromConcentration(Step(22, 0.6));
  PivotSpec spec;
  spec.mode = PivotMode::kOnline;
  spec.deadline = 0.5;  // layer 16: nothing has risen
  PivotDecision online = Decide(metrics, spec);
  EXPECT_EQ(online.decided_at_layer, 16);
  EXPECT_EQ(online.transition_layer, 8) << "the lowest at a tie";
  EXPECT_EQ(online.skeleton_from_layer, 17);
  // The last layer of the range is the best: the layer after it is the pivot, and still in full.
  spec.deadline = 22.0 / 32;
  online = Decide(metrics, spec);
  EXPECT_EQ(online.decided_at_layer, 22);
  EXPECT_EQ(online.pivot_layer, 23);
  EXPECT_EQ(online.skeleton_from_layer, 24);
}

TEST(OnlinePivotTest, ASmallRiseIsNotConfirmedUnlessAskedFor) {
  const auto metrics = Noisy();
  PivotSpec spec;
  spec.mode = PivotMode::kOnline;
  EXPECT_EQ(Decide(metrics, spec).transition_layer, 16);
  spec.confirm_score = 0;
  EXPECT_EQ(Decide(metrics, spec).transition_layer, 8);
}

TEST(OnlinePivotTest, NothingToSearchMeansTheLastLayer) {
  PivotSpec spec;
  spec.mode = PivotMode::kOnline;
  for (size_t layers : {1U, 2U}) {
    const std::vector<LayerMetrics> metrics(layers, LayerMetrics{.entropy = 1, .sparsity = 0.5});
    const PivotDecision decision = Decide(metrics, spec);
    EXPECT_EQ(decision.mode, PivotMode::kOnline);
    EXPECT_EQ(decision.pivot_layer, static_cast<int64_t>(layers) - 1);
    EXPECT_EQ(decision.decided_at_layer, static_cast<int64_t>(layers) - 1);
    EXPECT_EQ(decision.transition_layer, std::nullopt);
  }
}

TEST(OnlinePivotTest, DecisionsKeepToTheirRanges) {
  for (int64_t layers = 1; layers <= 40; ++layers) {
    std::vector<LayerMetrics> metrics;
    for (int64_t l = 0; l < layers; ++l) {
      metrics.push_back({.entropy = 3 + Noise(l), .sparsity = 0.5, .variance = 5 + Noise(l + 99)});
    }
    for (const double deadline : {0.25, 0.6, 1.0}) {
      PivotSpec spec;
      spec.mode = PivotMode::kOnline;
      spec.deadline = deadline;
      const PivotDecision decision = Decide(metrics, spec);
      const PivotRange pivots = PossiblePivots(layers, spec);
      const PivotRange centralities = PossibleCentralities(layers, spec);
      EXPECT_GE(decision.pivot_layer, pivots.first) << layers;
      EXPECT_LE(decision.pivot_layer, pivots.last) << layers;
      EXPECT_GE(decision.centrality_layer, centralities.first) << layers;
      EXPECT_LE(decision.centrality_layer, centralities.last) << layers;
    }
  }
}

TEST(ProfiledPivotTest, TakesTheProfilesLayerOrAnswersOnline) {
  const auto metrics = FromConcentration(Step(16, 0.6));
  PivotSpec spec;
  spec.mode = PivotMode::kProfiled;
  EXPECT_EQ(Decide(metrics, spec).mode, PivotMode::kOnline);
  spec.profiled_layer = 12;
  spec.profiled_prompts = 8;
  const PivotDecision decision = Decide(metrics, spec);
  EXPECT_EQ(decision.mode, PivotMode::kProfiled);
  EXPECT_EQ(decision.pivot_layer, 12);
  EXPECT_EQ(decision.decided_at_layer, 12);
  EXPECT_EQ(decision.skeleton_from_layer, 13);
  EXPECT_EQ(decision.profiled_prompts, 8);
}

}  // namespace
}  // namespace structkv::method
