#include "service/rpc/prompt_picture.h"

#include <algorithm>

#include "absl/types/span.h"

namespace structkv::rpc {
namespace {

constexpr int64_t kStretches = PromptPicture::kStretches;

// The first token of a stretch.
int64_t Begin(int64_t stretch, int64_t tokens) { return stretch * tokens / kStretches; }

// The share, of 255, of each stretch's rows that are in `positions`: ascending lists of `kept`
// each.
std::array<uint8_t, kStretches> Shares(absl::Span<const int32_t> positions, int64_t kept,
                                       int64_t tokens) {
  std::array<int64_t, kStretches> counts = {};
  int64_t heads = 0;
  for (; !positions.empty(); positions.remove_prefix(kept), ++heads) {
    auto from = positions.begin();
    const auto end = from + kept;
    for (int64_t i = 0; i < kStretches; ++i) {
      const auto to = std::lower_bound(from, end, Begin(i + 1, tokens));
      counts[i] += to - from;
      from = to;
    }
  }
  std::array<uint8_t, kStretches> shares = {};
  for (int64_t i = 0; i < kStretches; ++i) {
    const int64_t rows = (Begin(i + 1, tokens) - Begin(i, tokens)) * heads;
    if (rows > 0) shares[i] = static_cast<uint8_t>(counts[i] * 255 / rows);
  }
  return shares;
}

}  // namespace

void PromptPicture::Add(const engine::LayerOutput& output) {
  Layer layer = {.metrics = output.metrics,
                 .transition = {},
                 .kept_tokens = output.kept_tokens,
                 .kept = Shares(output.positions, output.kept_tokens, tokens_)};
  const std::lock_guard lock(mutex_);
  // The pivot may have come before it.
  Layer& known = layers_[output.layer];
  layer.transition = known.transition;
  known = layer;
}

void PromptPicture::Add(const engine::PivotResult& pivot) {
  const std::lock_guard lock(mutex_);
  pivot_ = {.layer = pivot.decision.pivot_layer,
            .decided_at_layer = pivot.decision.decided_at_layer,
            .skeleton_tokens = static_cast<int64_t>(pivot.skeleton.size())};
  for (const method::LayerScore& score : pivot.decision.layers) {
    layers_[score.layer].transition = score.transition;
  }
}

PromptPicture::View PromptPicture::view() const {
  const std::lock_guard lock(mutex_);
  View view = {.layers = layers_, .pivot = pivot_};
  int64_t kept = 0;
  int64_t seen = 0;
  for (const auto& [number, layer] : layers_) {
    if (layer.kept_tokens == 0) continue;  // known by the pivot's decision alone
    kept += layer.kept_tokens;
    ++seen;
  }
  if (seen > 0) view.kept_share = static_cast<double>(kept) / static_cast<double>(seen * tokens_);
  return view;
}

}  // namespace structkv::rpc
