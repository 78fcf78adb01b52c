// How long the stages of a layer's computation took.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace structkv::engine {

enum class Stage : uint8_t {
  kSaliency,    // scores, their sums and the layer's metrics
  kSelect,      // which tokens stay
  kGather,      // their rows
  kCentrality,  // what StructKV sums up over layers, and the pivot that follows from it
  kLayerPass,   // the first three in one call of a backend that takes whole layers
};
inline constexpr std::array kStages = {Stage::kSaliency, Stage::kSelect, Stage::kGather,
                                       Stage::kCentrality, Stage::kLayerPass};

constexpr std::string_view StageName(Stage stage) {
  constexpr std::array<std::string_view, kStages.size()> kNames = {"saliency", "select", "gather",
                                                                   "centrality", "layer_pass"};
  return kNames[static_cast<size_t>(stage)];
}

class StageTimes {
 public:
  using Clock = std::chrono::steady_clock;

  void Add(Stage stage, Clock::duration time) { times_[static_cast<size_t>(stage)] += time; }
  // Zero: the layer had no such stage.
  Clock::duration Of(Stage stage) const { return times_[static_cast<size_t>(stage)]; }

 private:
  std::array<Clock::duration, kStages.size()> times_ = {};
};

// Adds the time that it lives to a stage.
class StageTimer {
 public:
  // `times` outlives it.
  StageTimer(StageTimes* times, Stage stage) : times_(times), stage_(stage) {}
  ~StageTimer() { times_->Add(stage_, StageTimes::Clock::now() - begin_); }
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

 private:
  StageTimes* const times_;
  const Stage stage_;
  const StageTimes::Clock::time_point begin_ = StageTimes::Clock::now();
};

}  // namespace structkv::engine
