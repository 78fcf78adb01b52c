#include "service/engine/layer_saliency.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "service/engine/kv_view.h"
#include "service/engine/nonfinite.h"
#include "service/engine/query_heads.h"
#include "service/method/budget.h"

namespace structkv::engine {
namespace {

int64_t TokensOf(const PromptSpec& spec, const LayerInput& input) {
  return input.positions.empty() ? spec.prompt_tokens
                                 : static_cast<int64_t>(input.positions.size());
}

absl::Status BadValue(const LayerInput& input, const BadStatistic& bad, int64_t first_head) {
  // The sign of a NaN means nothing.
  const float value = std::isnan(bad.value) ? std::abs(bad.value) : bad.value;
  const int64_t token = input.positions.empty() ? bad.token : input.positions[bad.token];
  absl::Status status = absl::InvalidArgumentError(
      absl::StrFormat("layer %d: saliency of token %d (KV head %d) is %g", input.layer, token,
                      first_head + bad.head, value));
  return std::isfinite(value) ? status : MarkNonFinite(std::move(status));
}

// One for each KV head; empty: none.
std::vector<float> KeyScalesOf(const PromptSpec& spec, const LayerInput& input) {
  if (input.key_scales.empty()) return {};
  const auto* scales = input.key_scales.as<const float>();
  std::vector<float> per_head(static_cast<size_t>(spec.geometry.kv_heads), scales[0]);
  if (spec.kv_scales == KvScales::kPerKvHead) {
    std::copy_n(scales, per_head.size(), per_head.begin());
  }
  return per_head;
}

}  // namespace

ScoredLayer::ScoredLayer(const PromptSpec& spec, const LayerInput& input)
    : key_scales_(KeyScalesOf(spec, input)) {
  const ModelGeometry& geometry = spec.geometry;
  params_.queries =
      TensorView::Dense(input.window_queries.data(), spec.queries(), Layout::kHeadTokenDim,
                        geometry.query_heads, spec.window_rows(), geometry.key_dim);
  params_.keys = KvView(spec, input.keys.data(), geometry.key_dim, TokensOf(spec, input),
                        /*in_order=*/!input.positions.empty());
  params_.lse = input.window_lse.as<const float>();
  if (!key_scales_.empty()) params_.key_scales = key_scales_.data();
  params_.scale = static_cast<float>(spec.attention_scale.value_or(0));
  params_.window_max = spec.method.window_reduce == method::WindowReduce::kMax;
}

absl::Status ScoredLayer::Named(absl::Status status, const LayerInput& input, int64_t first_head,
                                const BadStatistic& bad) {
  if (status.ok()) return status;
  if (absl::IsInvalidArgument(status) && bad.head != kNoHead) {
    // The backend knows whether a query, a log-sum-exp or a score was at fault.
    return MarkNonFinite(absl::InvalidArgumentError(
        absl::StrCat(BadValue(input, bad, first_head).message(), " (", status.message(), ")")));
  }
  return absl::Status(status.code(), absl::StrCat("layer ", input.layer, ": ", status.message()));
}

absl::Status ComputePerHead(const PromptSpec& spec, const Backend& backend, BufferPool& pool,
                            const LayerInput& input, int64_t first_head, float* out,
                            ParallelFor parallel) {
  const ScoredLayer scored(spec, input);
  BadStatistic bad{.head = ScoredLayer::kNoHead};
  absl::Status status = TellsQueryHeadsApart(spec)
                            ? QueryHeadSaliency(scored.params(), spec.method.group_reduce, backend,
                                                pool, out, &bad, parallel)
                            : backend.Saliency(scored.params(), out, &bad, parallel);
  return ScoredLayer::Named(std::move(status), input, first_head, bad);
}

absl::Status CheckGiven(const LayerInput& input, const Buffer& values, int64_t first_head,
                        int64_t heads, int64_t tokens, const Backend& backend,
                        ParallelFor parallel) {
  const std::optional<BadStatistic> bad =
      backend.FindBad(values.as<const float>(), heads, tokens, parallel);
  return bad.has_value() ? BadValue(input, *bad, first_head) : absl::OkStatus();
}

absl::StatusOr<LayerSaliency> ComputeLayerSaliency(const PromptSpec& spec, const Backend& backend,
                                                   BufferPool& pool, LayerInput& input,
                                                   ParallelFor parallel) {
  const int64_t tokens = TokensOf(spec, input);
  const int64_t kv_heads = spec.geometry.kv_heads;
  LayerSaliency saliency;
  absl::Status status;
  switch (spec.statistic) {
    case Statistic::kWindowQueries:
      saliency.per_head = pool.Acquire(kv_heads * tokens * sizeof(float));
      status = ComputePerHead(spec, backend, pool, input, /*first_head=*/0,
                              saliency.per_head.as<float>(), parallel);
      break;
    case Statistic::kSaliencyPerKvHead:
      saliency.per_head = std::move(input.saliency);
      status = CheckGiven(input, saliency.per_head, /*first_head=*/0, kv_heads, tokens, backend,
                          parallel);
      break;
    case Statistic::kSaliency:
      saliency.sum = std::move(input.saliency);
      status = CheckGiven(input, saliency.sum, /*first_head=*/0, 1, tokens, backend, parallel);
      break;
    case Statistic::kNone:
      status = absl::InternalError("a method with statistics was given none");
      break;
  }
  if (!status.ok()) return status;
  return SumUp(spec, backend, pool, input.layer, tokens, std::move(saliency), parallel);
}

int64_t TopCount(const PromptSpec& spec, int64_t tokens) {
  return std::max<int64_t>(1, method::ShareOfTokens(spec.method.pivot.sparsity_ratio, tokens));
}

absl::StatusOr<method::LayerMetrics> MetricsOf(const PromptSpec& spec, int64_t layer,
                                               int64_t tokens, SaliencySums sums) {
  if (sums.total == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer, ": saliency is zero for every token"));
  }
  // Written so that NaN and infinity fail as well.
  if (!(sums.total <= kMaxSaliencyTotal)) {
    return absl::InvalidArgumentError(absl::StrCat("layer ", layer, ": saliency sums to ",
                                                   sums.total, "; at most ", kMaxSaliencyTotal,
                                                   " is allowed"));
  }
  // The same sum, rounded in another order: the difference would be a gradient from layer to layer
  // where there is none, and gradients are taken as shares of the largest.
  if (TopCount(spec, tokens) == tokens) sums.top_mass = sums.total;
  return method::MetricsFromSums(sums, tokens);
}

absl::StatusOr<LayerSaliency> SumUp(const PromptSpec& spec, const Backend& backend,
                                    BufferPool& pool, int64_t layer, int64_t tokens,
                                    LayerSaliency saliency, ParallelFor parallel) {
  const int64_t kv_heads = spec.geometry.kv_heads;
  if (saliency.sum.empty() && kv_heads > 1) {
    saliency.sum = pool.Acquire(tokens * sizeof(float));
    backend.SumHeads(saliency.per_head.as<const float>(), kv_heads, tokens,
                     saliency.sum.as<float>(), parallel);
  }
  const SaliencySums sums =
      backend.Sums(saliency.sum_scores(), tokens, TopCount(spec, tokens), parallel);
  absl::StatusOr<method::LayerMetrics> metrics = MetricsOf(spec, layer, tokens, sums);
  if (!metrics.ok()) return metrics.status();
  saliency.metrics = *metrics;
  return saliency;
}

}  // namespace structkv::engine
