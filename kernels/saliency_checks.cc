#include "kernels/saliency_checks.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace structkv {
namespace {

template <typename T>
bool Contains(const std::vector<T>& values, T value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

absl::Status RowError(const SaliencyParams& params, const char* what, int64_t query_head,
                      int64_t row, float value, BadStatistic* bad) {
  const int64_t group = params.queries.heads / params.keys.heads;
  const int64_t token = params.keys.tokens - params.queries.tokens + row;
  if (bad != nullptr) *bad = {query_head / group, token, value};
  return absl::InvalidArgumentError(
      absl::StrFormat("%s: query head %d, window row %d (token %d) is %f, must be finite", what,
                      query_head, row, token, value));
}

absl::Status CheckKeyScales(const SaliencyParams& params) {
  if (params.key_scales == nullptr) return absl::OkStatus();
  for (int64_t head = 0; head < params.keys.heads; ++head) {
    const float scale = params.key_scales[head];
    if (std::isfinite(scale) && scale > 0 &&
        std::isfinite(static_cast<float>(SaliencyScale(params, head)))) {
      continue;
    }
    return absl::InvalidArgumentError(absl::StrFormat(
        "key_scales: kv head %d is %g, must be above 0 and finite, times the scale too", head,
        scale));
  }
  return absl::OkStatus();
}

absl::Status CheckPages(const TensorView& keys, const BackendCapabilities& capabilities) {
  if (keys.block_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("keys: block_tokens ", keys.block_tokens, ", must not be negative"));
  }
  if (keys.paged() && !capabilities.paged) {
    return absl::InvalidArgumentError("keys: paged, which is not supported");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckSaliencyParams(const SaliencyParams& params,
                                 const BackendCapabilities& capabilities) {
  const TensorView& q = params.queries;
  const TensorView& k = params.keys;
  if (k.heads < 1 || k.tokens < 1 || k.data == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("keys: shape [", k.heads, ", ", k.tokens, ", ",
                                                   k.dim, "], every size must be at least 1"));
  }
  if (absl::Status status = CheckPages(k, capabilities); !status.ok()) return status;
  if (!capabilities.SupportsDim(k.dim)) {
    return absl::InvalidArgumentError(
        absl::StrCat("key_dim: ", k.dim, ", must be a multiple of ", capabilities.dim_step, " in [",
                     capabilities.min_dim, ", ", capabilities.max_dim, "] or ",
                     capabilities.extra_dims.empty() ? 0 : capabilities.extra_dims.front(), " or ",
                     capabilities.extra_dims.empty() ? 0 : capabilities.extra_dims.back()));
  }
  if (q.dim != k.dim) {
    return absl::InvalidArgumentError(
        absl::StrCat("queries: dim ", q.dim, ", must be the keys' ", k.dim));
  }
  if (IsFp8(k.dtype) ? IsFp8(q.dtype) : q.dtype != k.dtype) {
    return absl::InvalidArgumentError(
        absl::StrFormat("queries: dtype %s, must be %s", std::string(DTypeName(q.dtype)),
                        IsFp8(k.dtype) ? "f32, f16 or bf16 where keys are 8-bit"
                                       : "the keys' " + std::string(DTypeName(k.dtype))));
  }
  if (!Contains(capabilities.dtypes, k.dtype)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("dtype: %s is not supported", std::string(DTypeName(k.dtype))));
  }
  if (q.heads < 1 || q.heads % k.heads != 0 || q.data == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("query_heads: ", q.heads, ", must be a multiple of kv_heads, ", k.heads));
  }
  if (params.window_max && q.heads != k.heads) {
    return absl::InvalidArgumentError(absl::StrCat("query_heads: ", q.heads, ", must be kv_heads, ",
                                                   k.heads, ", with window_max"));
  }
  const int64_t limit = std::min(capabilities.max_window, k.tokens);
  if (q.tokens < 1 || q.tokens > limit) {
    return absl::InvalidArgumentError(
        absl::StrCat("window: ", q.tokens, ", must be in [1, ", limit, "]"));
  }
  if (!std::isfinite(params.scale)) {
    return absl::InvalidArgumentError(absl::StrCat("scale: ", params.scale, ", must be finite"));
  }
  return CheckKeyScales(params);
}

double SaliencyScale(const SaliencyParams& params) {
  if (params.scale != 0.0F) return params.scale;
  return 1.0 / std::sqrt(static_cast<double>(params.keys.dim));
}

double SaliencyScale(const SaliencyParams& params, int64_t head) {
  const double unit = params.key_scales != nullptr ? params.key_scales[head] : 1.0;
  return SaliencyScale(params) * unit;
}

absl::Status BadQueryError(const SaliencyParams& params, int64_t query_head, int64_t row,
                           float value, BadStatistic* bad) {
  return RowError(params, "queries", query_head, row, value, bad);
}

absl::Status BadLseError(const SaliencyParams& params, int64_t query_head, int64_t row, float value,
                         BadStatistic* bad) {
  return RowError(params, "lse", query_head, row, value, bad);
}

absl::Status BadScoreError(const BadStatistic& found, BadStatistic* bad) {
  if (bad != nullptr) *bad = found;
  return absl::InvalidArgumentError(
      absl::StrFormat("saliency: kv head %d, token %d: score is %f, must be finite", found.head,
                      found.token, found.value));
}

}  // namespace structkv
