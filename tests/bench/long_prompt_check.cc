#include "tests/bench/long_prompt_check.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <thread>

#include "kernels/backend_registry.h"

namespace structkv::bench {
namespace {

constexpr int kThreads = 2;

// S of one KV head, [N].
std::vector<float> HeadSaliency(const v1::Open& open, uint32_t window, const Backend& backend,
                                const TensorSource& source, uint32_t layer, int64_t head) {
  const v1::ModelGeometry& geometry = open.geometry();
  const int64_t group = geometry.query_head_count() / geometry.kv_head_count();
  const int64_t tokens = open.prompt_tokens();
  const int64_t dim = geometry.key_dim();
  const uint64_t head_bytes = static_cast<uint64_t>(tokens * dim) * sizeof(uint16_t);
  const uint64_t query_bytes = static_cast<uint64_t>(window * dim) * sizeof(uint16_t);
  // Heads of few tokens end within a piece: from the piece in which this one begins.
  const uint64_t begin = static_cast<uint64_t>(head) * head_bytes / TensorSource::kPieceBytes *
                         TensorSource::kPieceBytes;
  const uint64_t end = static_cast<uint64_t>(head + 1) * head_bytes;
  const std::vector<std::byte> keys = source.Make(layer, v1::TENSOR_KEYS, begin, end - begin);
  const std::vector<std::byte> queries =
      source.Make(layer, v1::TENSOR_WINDOW_QUERIES, 0, geometry.query_head_count() * query_bytes);
  SaliencyParams params;
  params.queries =
      TensorView::Dense(queries.data() + static_cast<uint64_t>(head * group) * query_bytes,
                        DType::kBF16, Layout::kHeadTokenDim, group, window, dim);
  params.keys = TensorView::Dense(keys.data() + (end - head_bytes - begin), DType::kBF16,
                                  Layout::kHeadTokenDim, 1, tokens, dim);
  std::vector<float> saliency(static_cast<size_t>(tokens));
  const absl::Status status = backend.Saliency(params, saliency.data(), nullptr, SerialFor);
  if (!status.ok()) {
    std::fprintf(stderr, "the reference: %s\n", status.ToString().c_str());
    std::exit(1);
  }
  return saliency;
}

}  // namespace

std::vector<float> ReferenceSaliency(const v1::Open& open, uint32_t window,
                                     const TensorSource& source, uint32_t layer) {
  std::vector<float> sum(open.prompt_tokens());
  if (open.statistic() == v1::STATISTIC_SALIENCY) {
    const uint64_t bytes = sum.size() * sizeof(float);
    const std::vector<std::byte> given = source.Make(layer, v1::TENSOR_SALIENCY, 0, bytes);
    std::memcpy(sum.data(), given.data(), bytes);
    return sum;
  }
  const std::unique_ptr<Backend> backend = *CreateBackend("reference");
  const auto heads = static_cast<int64_t>(open.geometry().kv_head_count());
  std::vector<std::vector<float>> per_head(static_cast<size_t>(heads));
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int64_t head = next++; head < heads; head = next++) {
        per_head[static_cast<size_t>(head)] =
            HeadSaliency(open, window, *backend, source, layer, head);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::vector<float>& head : per_head) {
    for (size_t j = 0; j < sum.size(); ++j) sum[j] += head[j];
  }
  return sum;
}

PositionCheck CheckPositions(const std::vector<float>& saliency, uint32_t window,
                             const std::vector<int32_t>& positions) {
  const std::unique_ptr<Backend> backend = *CreateBackend("reference");
  std::vector<int32_t> expected(positions.size());
  backend->Select({.scores = saliency.data(),
                   .tokens = static_cast<int64_t>(saliency.size()),
                   .window = window,
                   .keep = static_cast<int64_t>(expected.size())},
                  expected.data());
  float cut = std::numeric_limits<float>::infinity();
  const auto window_begin = static_cast<int32_t>(saliency.size() - window);
  for (const int32_t position : expected) {
    if (position < window_begin) cut = std::min(cut, saliency[static_cast<size_t>(position)]);
  }
  std::vector<int32_t> different;
  std::set_symmetric_difference(expected.begin(), expected.end(), positions.begin(),
                                positions.end(), std::back_inserter(different));
  PositionCheck check = {.kept = static_cast<int64_t>(positions.size()),
                         .different = static_cast<int64_t>(different.size()) / 2};
  for (const int32_t position : different) {
    const double away = std::abs(saliency[static_cast<size_t>(position)] - cut);
    check.farthest = std::max(check.farthest, away / cut);
  }
  return check;
}

}  // namespace structkv::bench
