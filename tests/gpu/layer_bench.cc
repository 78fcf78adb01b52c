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
constexpr int kLanes = 4;  // as DeviceOptions::lanes
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

LayerBench::Lane::Lane(int64_t tokens, int64_t kept)
    : per_head(Floats(kKvHeads * tokens)),
      saliency(Floats(tokens)),
      centrality(Upload(std::vector<float>(static_cast<size_t>(tokens)))),
      flags(sizeof(cuda::SaliencyFlags)),
      parts(static_cast<size_t>(cuda::SumsParts(tokens)) * sizeof(cuda::SumsPart)),
      sums(sizeof(cuda::RowSums)),
      positions(Floats(kept)),
      kept_keys(static_cast<size_t>(kKvHeads * kept * kDim * 2)),
      kept_values(kept_keys.size()) {}

LayerBench::LayerBench(int64_t tokens, int64_t l2_bytes)
    : tokens_(tokens),
      kept_((tokens + 9) / 10),
      queries_(Upload(Values(kQueryHeads * kWindow * kDim))),
      lse_(Upload(
          std::vector<float>(kQueryHeads * kWindow, std::log(static_cast<float>(tokens)) + 0.5F))),
      block_table_(Upload(ShuffledBlocks(tokens))),
      frequencies_(Upload(Frequencies())) {
  const std::vector<uint16_t> some = Values(size_t{1} << 22);
  const int64_t bytes = kKvHeads * tokens * kDim * 2;
  for (int64_t all = 0; all < 4 * l2_bytes || layers_.size() < 2; all += bytes) {
    layers_.push_back({Repeated(some, bytes), Repeated(some, bytes)});
  }
  int device = 0;
  OrDie(cudaGetDevice(&device), "cudaGetDevice");
  OrDie(cuda::GetSelectLimits(device, &limits_), "GetSelectLimits");
  for (int i = 0; i < kLanes; ++i) {
    Lane& lane = lanes_.emplace_back(tokens, kept_);
    if (i > 0) {
      OrDie(cudaStreamCreateWithFlags(&lane.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    }
    OrDie(cudaEventCreateWithFlags(&lane.done, cudaEventDisableTiming), "cudaEventCreate");
    lane.workspace.emplace_back(static_cast<size_t>(cuda::SaliencyWorkspaceBytes(
        Request(layers_[0], lane, /*with_lse=*/false, /*per_head=*/true))));
    const cuda::SelectRow row = SelectRow(lane);
    lane.scratch.emplace_back(static_cast<size_t>(cuda::SelectScratchBytes(&row, 1, limits_)));
  }
  OrDie(cudaEventCreateWithFlags(&begun_, cudaEventDisableTiming), "cudaEventCreate");
}

LayerBench::~LayerBench() {
  for (const Lane& lane : lanes_) {
    cudaEventDestroy(lane.done);
    if (lane.stream != nullptr) cudaStreamDestroy(lane.stream);
  }
  cudaEventDestroy(begun_);
}

cuda::SaliencyRequest LayerBench::Request(const Layer& layer, const Lane& lane, bool with_lse,
                                          bool per_head) const {
  cuda::SaliencyRequest request;
  request.queries = TensorView::Dense(queries_.as<void>(), DType::kBF16, Layout::kHeadTokenDim,
                                      kQueryHeads, kWindow, kDim);
  request.keys = TensorView::Dense(layer.keys.as<void>(), DType::kBF16, Layout::kHeadTokenDim,
                                   kKvHeads, tokens_, kDim);
  if (with_lse) request.lse = lse_.as<float>();
  request.scale = 1.0F / std::sqrt(static_cast<float>(kDim));
  if (per_head) request.per_head = lane.per_head.as<float>();
  request.saliency = lane.saliency.as<float>();
  request.centrality = lane.centrality.as<float>();
  request.decay = 0.9F;
  request.parts = lane.parts.as<cuda::SumsPart>();
  request.flags = lane.flags.as<cuda::SaliencyFlags>();
  if (!lane.workspace.empty()) {
    request.workspace = lane.workspace[0].as<void>();
    request.workspace_bytes = static_cast<int64_t>(lane.workspace[0].size());
  }
  return request;
}

cuda::SelectRow LayerBench::SelectRow(const Lane& lane) const {
  return {.scores = lane.saliency.as<float>(),
          .tokens = tokens_,
          .positions = lane.positions.as<int32_t>(),
          .window = kWindow,
          .keep = kept_,
          .sums = lane.sums.as<cuda::RowSums>(),
          .top_count = kept_,
          .parts = lane.parts.as<cuda::SumsPart>()};
}

cuda::GatherJob LayerBench::Job(const DeviceBytes& from, const DeviceBytes& to, const Lane& lane,
                                bool in_blocks) const {
  const auto source =
      in_blocks ? TensorView::Paged(from.as<void>(), DType::kBF16, Layout::kTokenHeadDim, kKvHeads,
                                    tokens_, kDim, block_table_.as<int32_t>(), kBlockTokens)
                : TensorView::Dense(from.as<void>(), DType::kBF16, Layout::kHeadTokenDim, kKvHeads,
                                    tokens_, kDim);
  return {source, lane.positions.as<int32_t>(), /*per_head=*/false,
          MutableTensorView::Dense(to.as<void>(), DType::kBF16, Layout::kHeadTokenDim, kKvHeads,
                                   kept_, kDim)};
}

void LayerBench::Saliency(const Layer& layer, const Lane& lane, bool with_lse,
                          bool per_head) const {
  OrDie(cuda::LaunchSaliency(Request(layer, lane, with_lse, per_head), lane.stream),
        "LaunchSaliency");
}

void LayerBench::Select(const Lane& lane) const {
  const cuda::SelectRow row = SelectRow(lane);
  OrDie(cuda::LaunchSelect({.rows = &row,
                            .row_count = 1,
                            .scratch = lane.scratch[0].as<void>(),
                            .scratch_bytes = static_cast<int64_t>(lane.scratch[0].size()),
                            .limits = limits_},
                           lane.stream),
        "LaunchSelect");
}

void LayerBench::Gather(const Layer& layer, const Lane& lane, bool in_blocks) const {
  const cuda::GatherJob jobs[] = {Job(layer.keys, lane.kept_keys, lane, in_blocks),
                                  Job(layer.values, lane.kept_values, lane, in_blocks)};
  OrDie(cuda::LaunchGather({jobs, 2}, lane.stream), "LaunchGather");
}

void LayerBench::GatherRotated(const Layer& layer, const Lane& lane) const {
  const cuda::GatherRotatedJob keys = {Job(layer.keys, lane.kept_keys, lane, /*in_blocks=*/false),
                                       {.pairs = kDim / 2,
                                        .from = frequencies_.as<float>(),
                                        .to = frequencies_.as<float>(),
                                        .positions = lane.positions.as<int32_t>()}};
  OrDie(cuda::LaunchGatherRotated({&keys, 1}, lane.stream), "LaunchGatherRotated");
  const cuda::GatherJob values = Job(layer.values, lane.kept_values, lane, /*in_blocks=*/false);
  OrDie(cuda::LaunchGather({&values, 1}, lane.stream), "LaunchGather");
}

void LayerBench::All(const Layer& layer, const Lane& lane, bool with_lse) const {
  Saliency(layer, lane, with_lse, /*per_head=*/false);
  Select(lane);
  Gather(layer, lane, /*in_blocks=*/false);
}

template <class Step>
double LayerBench::Micros(Events* events, int layers, const Step& step) const {
  const double all = events->Median([&] {
    for (int layer = 0; layer < layers; ++layer) step(LayerAt(layer));
  });
  return all / layers;
}

double LayerBench::MicrosInAllLanes(Events* events, int layers, bool with_lse) const {
  const double all = events->Median([&] {
    // The default stream, which is the first lane's, begins before the others and ends after them.
    OrDie(cudaEventRecord(begun_), "cudaEventRecord");
    for (const Lane& lane : lanes_) {
      OrDie(cudaStreamWaitEvent(lane.stream, begun_), "cudaStreamWaitEvent");
    }
    for (int layer = 0; layer < layers; ++layer) {
      All(LayerAt(layer), lanes_[static_cast<size_t>(layer) % lanes_.size()], with_lse);
    }
    for (const Lane& lane : lanes_) {
      OrDie(cudaEventRecord(lane.done, lane.stream), "cudaEventRecord");
      OrDie(cudaStreamWaitEvent(nullptr, lane.done), "cudaStreamWaitEvent");
    }
  });
  return all / layers;
}

void LayerBench::ExpectFinite() const {
  for (const Lane& lane : lanes_) {
    cuda::SaliencyFlags flags;
    lane.flags.CopyTo(&flags, sizeof(flags));
    if (flags.score != cuda::kNothingBad) OrDie(cudaErrorUnknown, "a score is not finite");
  }
}

std::vector<Row> LayerBench::Measure(Events* events) {
  const auto tokens = static_cast<double>(tokens_);
  const double keys = tokens * kKvHeads * kDim * 2;
  // Read, and the window's kept rows written; of keys and of values.
  const double gathered = 4.0 * static_cast<double>(kept_) * kKvHeads * kDim * 2;
  // Saliency, out and in, and the centrality, in and out.
  const double selected = tokens * sizeof(float);
  const double summed = 3 * tokens * sizeof(float);
  const int turns = std::max(4, static_cast<int>(layers_.size()));
  const Lane& lane = lanes_[0];
  std::vector<Row> rows;
  for (const bool with_lse : {true, false}) {
    // Saliency of each head, of all and the centrality (in and out) beside the keys.
    rows.push_back({with_lse ? "saliency, lse given" : "saliency", tokens_,
                    keys + kKvHeads * tokens * sizeof(float) + summed,
                    Micros(events, turns, [&](const Layer& layer) {
                      Saliency(layer, lane, with_lse, /*per_head=*/true);
                    })});
  }
  rows.push_back({"selection", tokens_, selected,
                  Micros(events, turns, [&](const Layer& /*layer*/) { Select(lane); })});
  rows.push_back({"gather", tokens_, gathered, Micros(events, turns, [&](const Layer& layer) {
                    Gather(layer, lane, /*in_blocks=*/false);
                  })});
  rows.push_back({"gather from blocks of 16", tokens_, gathered,
                  Micros(events, turns,
                         [&](const Layer& layer) { Gather(layer, lane, /*in_blocks=*/true); })});
  rows.push_back({"gather, keys moved", tokens_, gathered,
                  Micros(events, turns, [&](const Layer& layer) { GatherRotated(layer, lane); })});
  for (const bool with_lse : {true, false}) {
    const double bar = tokens_ != kBarTokens ? 0 : with_lse ? kBarMicros : kBarMicrosWithoutLse;
    const std::string lse = with_lse ? ", lse given" : "";
    const double bytes = keys + summed + selected + gathered;
    rows.push_back(
        {"32 layers" + lse, tokens_, bytes,
         Micros(events, kLayers, [&](const Layer& layer) { All(layer, lane, with_lse); }), bar});
    rows.push_back({"32 layers, 4 at once" + lse, tokens_, bytes,
                    MicrosInAllLanes(events, kLayers, with_lse), bar});
  }
  ExpectFinite();
  return rows;
}

}  // namespace structkv::gpu
