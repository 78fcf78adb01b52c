#include "tests/gpu/layer_bench.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

namespace structkv::gpu {
namespace {

constexpr int64_t kQueryHeads = 32;
constexpr int64_t kKvHeads = 8;
constexpr int64_t kDim = 128;
constexpr int64_t kWindow = 8;
constexpr int64_t kBlockTokens = 16;
constexpr int kLayers = 32;
// Of a layer with 131,072 tokens, where 32 of them are to take 3.3 ms and 4.6 ms.
constexpr int64_t kBarTokens = 131072;
constexpr double kBarMicros = 3300.0 / kLayers;
constexpr double kBarMicrosWithoutLse = 4600.0 / kLayers;

size_t Floats(int64_t count) { return static_cast<size_t>(count) * sizeof(float); }

// bf16 values of about a normal distribution's spread, made on the host.
std::vector<uint16_t> Values(size_t count) {
  std::vector<uint16_t> values(count);
  uint32_t state = 12345;
  for (uint16_t& value : values) {
    float sum = 0;
    for (int i = 0; i < 3; ++i) {
      state = state * 1664525 + 1013904223;
      sum += static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0F;
    }
    uint32_t bits;
    std::memcpy(&bits, &sum, sizeof(bits));
    value = static_cast<uint16_t>(bits >> 16);
  }
  return values;
}

template <class T>
DeviceBytes Upload(const std::vector<T>& from) {
  return {from.data(), from.size() * sizeof(T)};
}

// Filled with `some` again and again.
DeviceBytes Repeated(const std::vector<uint16_t>& some, int64_t bytes) {
  DeviceBytes out(static_cast<size_t>(bytes));
  const auto step = static_cast<int64_t>(some.size() * sizeof(some[0]));
  for (int64_t at = 0; at < bytes; at += step) {
    OrDie(cudaMemcpy(out.as<char>() + at, some.data(),
                     static_cast<size_t>(std::min(step, bytes - at)), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
  return out;
}

std::vector<int32_t> ShuffledBlocks(int64_t tokens) {
  std::vector<int32_t> blocks(static_cast<size_t>(tokens / kBlockTokens));
  std::iota(blocks.begin(), blocks.end(), 0);
  std::mt19937_64 random(1);
  std::shuffle(blocks.begin(), blocks.end(), random);
  return blocks;
}

std::vector<float> Frequencies() {
  std::vector<float> frequencies;
  for (int j = 0; j < kDim / 2; ++j) {
    frequencies.push_back(static_cast<float>(std::pow(500000.0, -2.0 * j / kDim)));
  }
  return frequencies;
}

}  // namespace

LayerBench::LayerBench(int64_t tokens, int64_t l2_bytes)
    : tokens_(tokens),
      kept_((tokens + 9) / 10),
      queries_(Upload(Values(kQueryHeads * kWindow * kDim))),
      lse_(Upload(
          std::vector<float>(kQueryHeads * kWindow, std::log(static_cast<float>(tokens)) + 0.5F))),
      per_head_(Floats(kKvHeads * tokens)),
      saliency_(Floats(tokens)),
      centrality_(Upload(std::vector<float>(static_cast<size_t>(tokens)))),
      flags_(sizeof(cuda::SaliencyFlags)),
      parts_(static_cast<size_t>(cuda::Tiles(tokens)) * sizeof(cuda::SumsPart)),
      sums_(sizeof(cuda::RowSums)),
      positions_(Floats(kept_)),
      block_table_(Upload(ShuffledBlocks(tokens))),
      frequencies_(Upload(Frequencies())) {
  const std::vector<uint16_t> some = Values(size_t{1} << 22);
  const int64_t bytes = kKvHeads * tokens * kDim * 2;
  const auto kept_bytes = static_cast<size_t>(kKvHeads * kept_ * kDim * 2);
  for (int64_t all = 0; all < 4 * l2_bytes || layers_.size() < 2; all += bytes) {
    layers_.push_back({Repeated(some, bytes), Repeated(some, bytes), DeviceBytes(kept_bytes),
                       DeviceBytes(kept_bytes)});
  }
  int device = 0;
  OrDie(cudaGetDevice(&device), "cudaGetDevice");
  OrDie(cuda::GetSelectLimits(device, &limits_), "GetSelectLimits");
  workspace_.emplace_back(static_cast<size_t>(
      cuda::SaliencyWorkspaceBytes(Request(layers_[0], /*with_lse=*/false, /*per_head=*/true))));
  const cuda::SelectRow row = SelectRow();
  scratch_.emplace_back(static_cast<size_t>(cuda::SelectScratchBytes(&row, 1, limits_)));
}

cuda::SaliencyRequest LayerBench::Request(const Layer& layer, bool with_lse, bool per_head) const {
  cuda::SaliencyRequest request;
  request.queries = TensorView::Dense(queries_.as<void>(), DType::kBF16, Layout::kHeadTokenDim,
                                      kQueryHeads, kWindow, kDim);
  request.keys = TensorView::Dense(layer.keys.as<void>(), DType::kBF16, Layout::kHeadTokenDim,
                                   kKvHeads, tokens_, kDim);
  if (with_lse) request.lse = lse_.as<float>();
  request.scale = 1.0F / std::sqrt(static_cast<float>(kDim));
  if (per_head) request.per_head = per_head_.as<float>();
  request.saliency = saliency_.as<float>();
  request.centrality = centrality_.as<float>();
  request.decay = 0.9F;
  request.flags = flags_.as<cuda::SaliencyFlags>();
  if (!workspace_.empty()) {
    request.workspace = workspace_[0].as<void>();
    request.workspace_bytes = static_cast<int64_t>(workspace_[0].size());
  }
  return request;
}

cuda::SelectRow LayerBench::SelectRow() const {
  return {.scores = saliency_.as<float>(),
          .tokens = tokens_,
          .positions = positions_.as<int32_t>(),
          .window = kWindow,
          .keep = kept_,
          .sums = sums_.as<cuda::RowSums>(),
          .top_count = kept_,
          .parts = parts_.as<cuda::SumsPart>()};
}

cuda::GatherJob LayerBench::Job(const DeviceBytes& from, const DeviceBytes& to,
                                bool in_blocks) const {
  const auto source =
      in_blocks ? TensorView::Paged(from.as<void>(), DType::kBF16, Layout::kTokenHeadDim, kKvHeads,
                                    tokens_, kDim, block_table_.as<int32_t>(), kBlockTokens)
                : TensorView::Dense(from.as<void>(), DType::kBF16, Layout::kHeadTokenDim, kKvHeads,
                                    tokens_, kDim);
  return {source, positions_.as<int32_t>(), /*per_head=*/false,
          MutableTensorView::Dense(to.as<void>(), DType::kBF16, Layout::kHeadTokenDim, kKvHeads,
                                   kept_, kDim)};
}

void LayerBench::Saliency(const Layer& layer, bool with_lse, bool per_head) const {
  OrDie(cuda::LaunchSaliency(Request(layer, with_lse, per_head), nullptr), "LaunchSaliency");
}

void LayerBench::Select() const {
  OrDie(cuda::LaunchStatistics({.values = saliency_.as<float>(),
                                .heads = 1,
                                .tokens = tokens_,
                                .parts = parts_.as<cuda::SumsPart>()},
                               nullptr),
        "LaunchStatistics");
  const cuda::SelectRow row = SelectRow();
  OrDie(cuda::LaunchSelect({.rows = &row,
                            .row_count = 1,
                            .scratch = scratch_[0].as<void>(),
                            .scratch_bytes = static_cast<int64_t>(scratch_[0].size()),
                            .limits = limits_},
                           nullptr),
        "LaunchSelect");
}

void LayerBench::Gather(const Layer& layer, bool in_blocks) const {
  const cuda::GatherJob jobs[] = {Job(layer.keys, layer.kept_keys, in_blocks),
                                  Job(layer.values, layer.kept_values, in_blocks)};
  OrDie(cuda::LaunchGather({jobs, 2}, nullptr), "LaunchGather");
}

void LayerBench::GatherRotated(const Layer& layer) const {
  const cuda::GatherRotatedJob keys = {Job(layer.keys, layer.kept_keys, /*in_blocks=*/false),
                                       {.pairs = kDim / 2,
                                        .from = frequencies_.as<float>(),
                                        .to = frequencies_.as<float>(),
                                        .positions = positions_.as<int32_t>()}};
  OrDie(cuda::LaunchGatherRotated({&keys, 1}, nullptr), "LaunchGatherRotated");
  const cuda::GatherJob values = Job(layer.values, layer.kept_values, /*in_blocks=*/false);
  OrDie(cuda::LaunchGather({&values, 1}, nullptr), "LaunchGather");
}

template <class Step>
double LayerBench::Micros(Events* events, int layers, const Step& step) const {
  const double all = events->Median([&] {
    for (int layer = 0; layer < layers; ++layer) {
      step(layers_[static_cast<size_t>(layer) % layers_.size()]);
    }
  });
  return all / layers;
}

std::vector<Row> LayerBench::Measure(Events* events) {
  const auto tokens = static_cast<double>(tokens_);
  const double keys = tokens * kKvHeads * kDim * 2;
  // Read, and the window's kept rows written; of keys and of values.
  const double gathered = 4.0 * static_cast<double>(kept_) * kKvHeads * kDim * 2;
  // Saliency in, centrality in and out.
  const double selected = 3 * tokens * sizeof(float);
  const int turns = std::max(4, static_cast<int>(layers_.size()));
  std::vector<Row> rows;
  for (const bool with_lse : {true, false}) {
    // Saliency of each head, of all and the centrality (in and out) beside the keys.
    rows.push_back({with_lse ? "saliency, lse given" : "saliency", tokens_,
                    keys + (kKvHeads + 3) * tokens * sizeof(float),
                    Micros(events, turns, [&](const Layer& layer) {
                      Saliency(layer, with_lse, /*per_head=*/true);
                    })});
  }
  rows.push_back({"metrics and selection", tokens_, selected,
                  Micros(events, turns, [&](const Layer& /*layer*/) { Select(); })});
  rows.push_back({"gather", tokens_, gathered, Micros(events, turns, [&](const Layer& layer) {
                    Gather(layer, /*in_blocks=*/false);
                  })});
  rows.push_back(
      {"gather from blocks of 16", tokens_, gathered,
       Micros(events, turns, [&](const Layer& layer) { Gather(layer, /*in_blocks=*/true); })});
  rows.push_back({"gather, keys moved", tokens_, gathered,
                  Micros(events, turns, [&](const Layer& layer) { GatherRotated(layer); })});
  for (const bool with_lse : {true, false}) {
    const double micros = Micros(events, kLayers, [&](const Layer& layer) {
      Saliency(layer, with_lse, /*per_head=*/false);
      Select();
      Gather(layer, /*in_blocks=*/false);
    });
    const double bar = with_lse ? kBarMicros : kBarMicrosWithoutLse;
    rows.push_back({with_lse ? "32 layers, lse given" : "32 layers", tokens_,
                    keys + selected + gathered, micros, tokens_ == kBarTokens ? bar : 0});
  }
  cuda::SaliencyFlags flags;
  flags_.CopyTo(&flags, sizeof(flags));
  if (flags.score != cuda::kNothingBad) OrDie(cudaErrorUnknown, "a score is not finite");
  return rows;
}

}  // namespace structkv::gpu
