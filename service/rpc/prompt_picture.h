// A prompt at a glance: what its layers' statistics were, where the pivot fell, which tokens
// stayed.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "service/engine/prompt.h"
#include "service/method/layer_metrics.h"

namespace structkv::rpc {

// Thread-safe. A few KiB for each layer, whatever the prompt's length.
class PromptPicture {
 public:
  // Stretches of equal length that the prompt's tokens are shown in, by position.
  static constexpr int kStretches = 128;

  struct Layer {
    std::optional<method::LayerMetrics> metrics;
    std::optional<double> transition;  // T(l), as the pivot's decision had it
    int64_t kept_tokens = 0;           // of each KV head
    // Of 255: how much of a stretch's rows were kept, over all KV heads.
    std::array<uint8_t, kStretches> kept = {};
  };
  struct Pivot {
    int64_t layer = 0;
    int64_t decided_at_layer = 0;
    int64_t skeleton_tokens = 0;
  };
  struct View {
    std::map<int64_t, Layer> layers;
    std::optional<Pivot> pivot;
    // Rows that were kept, of the rows of the layers seen; 0 where there are none.
    double kept_share = 0;
  };

  // Of a prompt of so many tokens, 1 or more.
  explicit PromptPicture(int64_t prompt_tokens) : tokens_(prompt_tokens) {}

  void Add(const engine::LayerOutput& output);
  void Add(const engine::PivotResult& pivot);

  View view() const;

 private:
  const int64_t tokens_;
  mutable std::mutex mutex_;
  std::map<int64_t, Layer> layers_;
  std::optional<Pivot> pivot_;
};

}  // namespace structkv::rpc
