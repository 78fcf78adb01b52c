#include "kernels/reference/reference_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "kernels/reference/rotate.h"
#include "kernels/reference/saliency.h"
#include "kernels/saliency_checks.h"

namespace structkv::reference {
namespace {

class ReferenceBackend final : public Backend {
 public:
  std::string_view name() const override { return "reference"; }
  std::string device() const override { return "scalar double precision"; }
  const BackendCapabilities& capabilities() const override { return capabilities_; }

  int64_t SaliencyScratchBytes(const SaliencyParams& params) const override {
    return reference::SaliencyScratchBytes(params);
  }

  absl::Status Saliency(const SaliencyParams& params, float* out, BadStatistic* bad,
                        ParallelFor /*parallel*/) const override {
    if (absl::Status status = CheckSaliencyParams(params, capabilities_); !status.ok()) {
      return status;
    }
    return reference::Saliency(params, out, bad);
  }

  void SumHeads(const float* per_head, int64_t heads, int64_t tokens, float* out,
                ParallelFor /*parallel*/) const override {
    for (int64_t j = 0; j < tokens; ++j) {
      double sum = 0;
      for (int64_t h = 0; h < heads; ++h) sum += per_head[h * tokens + j];
      out[j] = static_cast<float>(sum);
    }
  }

  std::optional<BadStatistic> FindBad(const float* values, int64_t heads, int64_t tokens,
                                      ParallelFor /*parallel*/) const override {
    for (int64_t j = 0; j < tokens; ++j) {
      for (int64_t h = 0; h < heads; ++h) {
        const float value = values[h * tokens + j];
        if (!std::isfinite(value) || value < 0) return BadStatistic{h, j, value};
      }
    }
    return std::nullopt;
  }

  void Pool(const float* in, int64_t tokens, Pooling pooling, int64_t kernel,
            float* out) const override {
    const int64_t half = pooling == Pooling::kNone ? 0 : kernel / 2;
    for (int64_t j = 0; j < tokens; ++j) {
      const int64_t begin = std::max<int64_t>(0, j - half);
      const int64_t end = std::min(tokens, j + half + 1);
      if (pooling == Pooling::kAvg) {
        const double sum = std::accumulate(in + begin, in + end, 0.0);
        out[j] = static_cast<float>(sum / static_cast<double>(kernel));
      } else {
        out[j] = *std::max_element(in + begin, in + end);
      }
    }
  }

  SaliencySums Sums(const float* scores, int64_t tokens, int64_t top_count,
                    ParallelFor /*parallel*/) const override {
    SaliencySums sums;
    for (int64_t j = 0; j < tokens; ++j) {
      const double s = scores[j];
      sums.total += s;
      sums.sum_s_log_s += s > 0 ? s * std::log(s) : 0.0;
      sums.sum_squares += s * s;
    }
    std::vector<float> sorted(scores, scores + tokens);
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    const int64_t top = std::clamp<int64_t>(top_count, 0, tokens);
    sums.top_mass = std::accumulate(sorted.begin(), sorted.begin() + top, 0.0);
    return sums;
  }

  void Accumulate(float decay, const float* saliency, float* centrality, int64_t tokens,
                  ParallelFor /*parallel*/) const override {
    for (int64_t j = 0; j < tokens; ++j) {
      centrality[j] = static_cast<float>(static_cast<double>(decay) * centrality[j] + saliency[j]);
    }
  }

  void Select(const SelectParams& params, int32_t* positions) const override {
    const int64_t others = params.tokens - params.window;
    std::vector<int32_t> order(others);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return params.scores[a] > params.scores[b]; });
    order.resize(params.keep - params.window);
    for (int64_t j = others; j < params.tokens; ++j) order.push_back(static_cast<int32_t>(j));
    std::sort(order.begin(), order.end());
    std::copy(order.begin(), order.end(), positions);
  }

  absl::Status Gather(const TensorView& source, const int32_t* positions, bool per_head,
                      const MutableTensorView& destination,
                      ParallelFor /*parallel*/) const override {
    const int64_t kept = destination.tokens;
    const size_t bytes = static_cast<size_t>(source.dim) * DTypeSize(source.dtype);
    for (int64_t h = 0; h < source.heads; ++h) {
      for (int64_t i = 0; i < kept; ++i) {
        const int32_t position = positions[(per_head ? h * kept : 0) + i];
        std::memcpy(destination.Row(h, i), source.Row(h, position), bytes);
      }
    }
    return absl::OkStatus();
  }

  absl::Status GatherRotated(const TensorView& source, const int32_t* rows, bool per_head,
                             const RotationParams& rotation, const MutableTensorView& destination,
                             ParallelFor /*parallel*/) const override {
    reference::GatherRotated(source, rows, per_head, rotation, destination);
    return absl::OkStatus();
  }

 private:
  const BackendCapabilities capabilities_ = {
      .dtypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3, DType::kF8E5M2},
      .layouts = {Layout::kHeadTokenDim, Layout::kTokenHeadDim},
      .paged = true,
  };
};

}  // namespace

std::unique_ptr<Backend> CreateReferenceBackend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace structkv::reference
