// When the layers of a prompt were computed, for traces.
#pragma once

#include <chrono>
#include <mutex>
#include <optional>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "service/session/session.h"

namespace structkv::rpc {

// Thread-safe. Some 100 bytes for each layer.
class PromptTimeline {
 public:
  struct View {
    absl::Time begin;
    std::optional<absl::Time> end;
    std::vector<session::LayerTiming> layers;  // in the order in which they were computed
  };

  void Add(const session::LayerTiming& layer) {
    const std::lock_guard lock(mutex_);
    layers_.push_back(layer);
  }
  // The prompt is over, before its stream may be. Only the first call counts.
  void End() {
    const std::lock_guard lock(mutex_);
    if (!end_.has_value()) end_ = absl::Now();
  }

  View view() const {
    const std::lock_guard lock(mutex_);
    return {begin_, end_, layers_};
  }
  // When it was by the clock on the wall, as of the prompt's begin.
  absl::Time TimeOf(std::chrono::steady_clock::time_point when) const {
    return begin_ + absl::FromChrono(when - steady_begin_);
  }

 private:
  const absl::Time begin_ = absl::Now();
  const std::chrono::steady_clock::time_point steady_begin_ = std::chrono::steady_clock::now();
  mutable std::mutex mutex_;
  std::optional<absl::Time> end_;
  std::vector<session::LayerTiming> layers_;
};

}  // namespace structkv::rpc
