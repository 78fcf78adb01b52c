#include "kernels/reference/saliency.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "kernels/reference/element.h"
#include "kernels/saliency_checks.h"

namespace structkv::reference {
namespace {

std::vector<double> DecodeRow(const TensorView& view, int64_t head, int64_t token) {
  std::vector<double> row(view.dim);
  for (int64_t i = 0; i < view.dim; ++i) {
    row[i] = Element(view.Row(head, token), view.dtype, i);
  }
  return row;
}

double Dot(const std::vector<double>& query, const std::byte* key, DType dtype) {
  double sum = 0;
  for (size_t i = 0; i < query.size(); ++i) {
    sum += query[i] * Element(key, dtype, static_cast<int64_t>(i));
  }
  return sum;
}

absl::Status CheckRows(const SaliencyParams& params, BadStatistic* bad) {
  const TensorView& q = params.queries;
  for (int64_t h = 0; h < q.heads; ++h) {
    for (int64_t r = 0; r < q.tokens; ++r) {
      for (double value : DecodeRow(q, h, r)) {
        if (!std::isfinite(value)) {
          return BadQueryError(params, h, r, static_cast<float>(value), bad);
        }
      }
    }
  }
  if (params.lse == nullptr) return absl::OkStatus();
  for (int64_t h = 0; h < q.heads; ++h) {
    for (int64_t r = 0; r < q.tokens; ++r) {
      const float lse = params.lse[h * q.tokens + r];
      if (!std::isfinite(lse)) return BadLseError(params, h, r, lse, bad);
    }
  }
  return absl::OkStatus();
}

// ln(sum of exp(scores)), safe for large scores.
double LogSumExp(const std::vector<double>& scores) {
  const double top = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (double score : scores) sum += std::exp(score - top);
  return top + std::log(sum);
}

}  // namespace

absl::Status Saliency(const SaliencyParams& params, float* out, BadStatistic* bad) {
  if (absl::Status status = CheckRows(params, bad); !status.ok()) return status;
  const TensorView& q = params.queries;
  const TensorView& k = params.keys;
  const int64_t window = q.tokens;
  const int64_t group = q.heads / k.heads;
  std::optional<BadStatistic> worst;
  for (int64_t g = 0; g < k.heads; ++g) {
    const double scale = SaliencyScale(params, g);
    std::vector<double> saliency(k.tokens, 0.0);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      for (int64_t r = 0; r < window; ++r) {
        const std::vector<double> query = DecodeRow(q, h, r);
        std::vector<double> scores(k.tokens - window + r + 1);
        for (int64_t j = 0; j < static_cast<int64_t>(scores.size()); ++j) {
          scores[j] = scale * Dot(query, k.Row(g, j), k.dtype);
          const auto narrow = static_cast<float>(scores[j]);
          if (!std::isfinite(narrow) && (!worst || j < worst->token)) worst = {g, j, narrow};
        }
        if (worst) continue;  // nothing but the lowest bad token matters now
        const double lse = params.lse != nullptr ? params.lse[h * window + r] : LogSumExp(scores);
        for (size_t j = 0; j < scores.size(); ++j) {
          const double weight = std::exp(scores[j] - lse);
          if (params.window_max) {
            saliency[j] = std::max(saliency[j], weight);
          } else {
            saliency[j] += weight / static_cast<double>(window);
          }
        }
      }
    }
    if (worst) continue;
    for (int64_t j = 0; j < k.tokens; ++j) {
      const auto value = static_cast<float>(saliency[j]);
      if (!std::isfinite(value) && (!worst || j < worst->token)) worst = {g, j, value};
      out[g * k.tokens + j] = value;
    }
  }
  if (worst) return BadScoreError(*worst, bad);
  return absl::OkStatus();
}

int64_t SaliencyScratchBytes(const SaliencyParams& params) {
  return static_cast<int64_t>(sizeof(double)) * (2 * params.keys.tokens + 2 * params.queries.dim);
}

}  // namespace structkv::reference
