#include "service/engine/query_heads.h"

#include <algorithm>
#include <vector>

namespace structkv::engine {
namespace {

// out[j] = max over rows of values[row, j].
void MaxOfRows(const float* values, int64_t rows, int64_t tokens, float* out,
               ParallelFor parallel) {
  constexpr int64_t kTile = 16384;
  parallel((tokens + kTile - 1) / kTile, [&](int64_t tile) {
    const int64_t begin = tile * kTile;
    const int64_t end = std::min(tokens, begin + kTile);
    std::copy(values + begin, values + end, out + begin);
    for (int64_t row = 1; row < rows; ++row) {
      const float* next = values + row * tokens;
      for (int64_t j = begin; j < end; ++j) out[j] = std::max(out[j], next[j]);
    }
  });
}

}  // namespace

bool TellsQueryHeadsApart(const PromptSpec& spec) {
  const method::MethodSpec& method = spec.method;
  return spec.geometry.group() > 1 && (method.window_reduce == method::WindowReduce::kMax ||
                                       method.group_reduce == method::GroupReduce::kMax);
}

SaliencyParams OneHeadOf(const SaliencyParams& params) {
  SaliencyParams one = params;
  one.queries.heads = params.queries.heads / params.keys.heads;
  one.keys.heads = one.queries.heads;
  one.keys.head_stride = 0;
  return one;
}

absl::Status QueryHeadSaliency(const SaliencyParams& params, method::GroupReduce reduce,
                               const Backend& backend, BufferPool& pool, float* out,
                               BadStatistic* bad, ParallelFor parallel) {
  SaliencyParams one = OneHeadOf(params);
  const int64_t group = one.queries.heads;
  const int64_t tokens = params.keys.tokens;
  const Buffer rows = pool.Acquire(group * tokens * sizeof(float));
  std::vector<float> scales(static_cast<size_t>(group));  // the KV head's, for each query head
  for (int64_t head = 0; head < params.keys.heads; ++head) {
    if (params.key_scales != nullptr) {
      std::fill(scales.begin(), scales.end(), params.key_scales[head]);
      one.key_scales = scales.data();
    }
    // Of a paged tensor too, where token 0 need not be the first.
    one.keys.data =
        static_cast<const std::byte*>(params.keys.data) +
        head * params.keys.head_stride * static_cast<int64_t>(DTypeSize(params.keys.dtype));
    one.queries.data = params.queries.Row(head * group, 0);
    if (params.lse != nullptr) one.lse = params.lse + head * group * params.queries.tokens;
    BadStatistic found = *bad;
    absl::Status status = backend.Saliency(one, rows.as<float>(), &found, parallel);
    if (!status.ok()) {
      if (found.head != bad->head) *bad = {head, found.token, found.value};
      return status;
    }
    float* to = out + head * tokens;
    if (reduce == method::GroupReduce::kMax) {
      MaxOfRows(rows.as<const float>(), group, tokens, to, parallel);
    } else {
      backend.SumHeads(rows.as<const float>(), group, tokens, to, parallel);
    }
  }
  return absl::OkStatus();
}

}  // namespace structkv::engine
