// Keys that are copied to a GPU ahead of the call that uses them, on the fake runtime.
#include "kernels/cuda/staged.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/layer_pass.h"
#include "tests/kernels/cuda/fake_backend.h"
#include "tests/kernels/cuda/gate.h"
#include "tests/kernels/random_tensor.h"
#include "tests/kernels/saliency_inputs.h"

namespace structkv {
namespace {

using testing::FakeCuda;
using testing::FakeHeld;
using testing::FakeWork;
using testing::Gate;
using testing::MakeFakeBackend;

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kKeep = 40;
// Each head's keys are a run that is long enough to be copied as it lies.
constexpr testing::Shape kShape = {4, 2, 600, 64, 4};
constexpr int64_t kKeyBytes = kShape.kv_heads * kShape.tokens * kShape.dim * 2;

struct Outcome {
  std::vector<float> sum;
  std::vector<int32_t> positions;
  SaliencySums sums;
  std::vector<std::byte> keys, values;  // [kv_heads, kept, dim]

  bool operator==(const Outcome& other) const {
    return sum == other.sum && positions == other.positions && keys == other.keys &&
           values == other.values && sums.total == other.sums.total &&
           sums.top_mass == other.sums.top_mass;
  }
};

// A layer whose keys lie in pinned memory, and its values beside them or in pageable memory.
class Layer {
 public:
  Layer(uint64_t seed, Layout layout, bool pinned_values = true)
      : random_(testing::Random(seed)),
        inputs_(kShape, DType::kBF16, layout, random_),
        values_(DType::kBF16, layout, kShape.kv_heads, kShape.tokens, kShape.dim),
        pinned_(*cuda::MakePinnedBytes(2 * kKeyBytes)),
        layout_(layout) {
    values_.Fill(random_);
    std::memcpy(pinned_.get(), inputs_.keys.view().data, kKeyBytes);
    std::memcpy(pinned_.get() + kKeyBytes, values_.view().data, kKeyBytes);
    params_ = inputs_.params();
    params_.keys.data = pinned_.get();
    source_ = values_.view();
    if (pinned_values) source_.data = pinned_.get() + kKeyBytes;
  }

  const SaliencyParams& params() const { return params_; }

  Outcome Run(const Backend& backend, StagedLayer* staged) const {
    Outcome out;
    EXPECT_EQ(TryRun(backend, staged, &out), absl::OkStatus());
    return out;
  }
  absl::Status TryRun(const Backend& backend, StagedLayer* staged, Outcome* to) const {
    constexpr auto kKeptBytes = static_cast<size_t>(kShape.kv_heads * kKeep * kShape.dim * 2);
    Outcome& out = *to;
    out = {.sum = std::vector<float>(kShape.tokens, -1.0F),
           .positions = std::vector<int32_t>(kKeep, -1),
           .keys = std::vector<std::byte>(kKeptBytes),
           .values = std::vector<std::byte>(kKeptBytes)};
    const auto room = [this](std::vector<std::byte>* rows) {
      return MutableTensorView::Dense(rows->data(), DType::kBF16, layout_, kShape.kv_heads, kKeep,
                                      kShape.dim);
    };
    const LayerPass pass = {.saliency = params_,
                            .top_count = 60,
                            .window = kShape.window,
                            .keep = kKeep,
                            .rows = {{.source = params_.keys, .destination = room(&out.keys)},
                                     {.source = source_, .destination = room(&out.values)}},
                            .staged = staged,
                            .sum = out.sum.data(),
                            .positions = out.positions.data(),
                            .sums = &out.sums};
    return backend.RunLayer(pass, nullptr, SerialFor);
  }

  // The rows are those of the keys and values at the positions.
  void ExpectRowsOf(const Outcome& out) const {
    const auto check = [&](const TensorView& from, const std::vector<std::byte>& rows) {
      const TensorView got =
          TensorView::Dense(rows.data(), DType::kBF16, layout_, kShape.kv_heads, kKeep, kShape.dim);
      for (int64_t head = 0; head < kShape.kv_heads; ++head) {
        for (int64_t i = 0; i < kKeep; ++i) {
          ASSERT_EQ(
              std::memcmp(got.Row(head, i), from.Row(head, out.positions[static_cast<size_t>(i)]),
                          static_cast<size_t>(kShape.dim) * 2),
              0)
              << "head " << head << ", row " << i;
        }
      }
    };
    check(inputs_.keys.view(), out.keys);
    check(values_.view(), out.values);
  }

 private:
  std::mt19937_64 random_;
  const testing::Inputs inputs_;
  testing::Tensor values_;
  const cuda::PinnedBytes pinned_;
  const Layout layout_;
  SaliencyParams params_;
  TensorView source_;
};

// Bytes that went to a device on a stream, or with null on all of them.
int64_t BytesTo(const std::vector<FakeWork>& log, cudaStream_t stream = nullptr) {
  int64_t bytes = 0;
  for (const FakeWork& work : log) {
    if (work.kind != FakeWork::Kind::kToDevice) continue;
    if (stream == nullptr || work.stream == stream) bytes += work.bytes;
  }
  return bytes;
}

class StagedTest : public ::testing::Test {
 protected:
  void SetUp() override {
    FakeCuda::Reset({});
    Start({.memory_bytes = 64 * kMiB, .slice_bytes = 4096});
  }
  void TearDown() override {
    backend_.reset();
    EXPECT_EQ(FakeCuda::held(), FakeHeld());
  }
  void Start(const cuda::DeviceOptions& options) {
    backend_.reset();
    backend_ = MakeFakeBackend(options);
  }
  // A pool with so many bytes.
  static cuda::DeviceOptions Pool(int64_t bytes) {
    return {.memory_bytes = bytes, .least_memory_bytes = 1, .slice_bytes = 4096};
  }
  // The least pool that takes the layer in one call.
  int64_t LeastPool(const Layer& layer) {
    for (int64_t bytes = kKeyBytes;; bytes += 4096) {
      Start(Pool(bytes));
      Outcome out;
      const absl::Status status = layer.TryRun(*backend_, nullptr, &out);
      if (status.ok()) return bytes;
      EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
    }
  }
  int64_t UsedBytes() const { return backend_->stats().gpus[0].calls.used_bytes; }

  std::unique_ptr<Backend> backend_;
};

// The order on the bus: while a layer is computed the next one's keys are copied, by a stream of
// their own that waits for nothing, and its call copies what is small alone.
TEST_F(StagedTest, OneLayersKeysAreCopiedWhileAnotherIsComputed) {
  const Layer first(1, Layout::kHeadTokenDim);
  const Layer second(2, Layout::kHeadTokenDim);
  const Layer third(3, Layout::kHeadTokenDim);
  const Outcome wanted = second.Run(*backend_, nullptr);
  FakeCuda::TakeLog();

  Gate gate;
  std::thread computes([&] { first.Run(*backend_, nullptr); });
  ASSERT_TRUE(gate.WaitUntilBlocked());
  const std::unique_ptr<StagedLayer> staged = backend_->Stage(second.params(), -1);
  ASSERT_NE(staged, nullptr);
  // Ends when its copy has ended, which comes after that of the second's.
  backend_->Stage(third.params(), -1).reset();
  const std::vector<FakeWork> meanwhile = FakeCuda::TakeLog();
  gate.Open();
  computes.join();
  ASSERT_FALSE(meanwhile.empty());
  const cudaStream_t copies = meanwhile[0].stream;
  EXPECT_EQ(BytesTo(meanwhile, copies), 2 * kKeyBytes);
  EXPECT_EQ(BytesTo(meanwhile), 2 * kKeyBytes);
  for (const FakeWork& work : meanwhile) {
    EXPECT_EQ(work.kind, FakeWork::Kind::kToDevice) << "nothing of the call that stands still";
  }

  FakeCuda::TakeLog();
  const Outcome got = second.Run(*backend_, staged.get());
  const std::vector<FakeWork> log = FakeCuda::TakeLog();
  EXPECT_EQ(got, wanted);
  second.ExpectRowsOf(got);
  EXPECT_LT(BytesTo(log), kKeyBytes / 10) << "queries alone";
  EXPECT_EQ(BytesTo(log, copies), 0);
  const auto of = [&log](FakeWork::Kind kind) {
    return std::find_if(log.begin(), log.end(),
                        [kind](const FakeWork& work) { return work.kind == kind; });
  };
  ASSERT_NE(of(FakeWork::Kind::kWait), log.end());
  EXPECT_LT(of(FakeWork::Kind::kWait), of(FakeWork::Kind::kKernel));
}

// What the call's stream does comes after copies that are still on their way.
TEST_F(StagedTest, ResultsAreThoseOfACallThatCopies) {
  for (const Layout layout : {Layout::kHeadTokenDim, Layout::kTokenHeadDim}) {
    for (const bool pinned_values : {true, false}) {
      const Layer layer(4, layout, pinned_values);
      const Outcome wanted = layer.Run(*backend_, nullptr);
      const std::unique_ptr<StagedLayer> staged = backend_->Stage(layer.params(), -1);
      ASSERT_NE(staged, nullptr);
      EXPECT_EQ(UsedBytes(), cuda::ArenaSize(kKeyBytes));
      const Outcome got = layer.Run(*backend_, staged.get());
      EXPECT_EQ(got, wanted);
      layer.ExpectRowsOf(got);
      EXPECT_EQ(UsedBytes(), 0) << "given back with the call";
      EXPECT_EQ(layer.Run(*backend_, staged.get()), wanted) << "of no use any more";
    }
  }
}

TEST_F(StagedTest, NothingIsStagedThatIsNotWorthIt) {
  const Layer layer(5, Layout::kHeadTokenDim);
  auto random = testing::Random(6);
  const testing::Inputs pageable(kShape, DType::kBF16, Layout::kHeadTokenDim, random);
  EXPECT_EQ(backend_->Stage(pageable.params(), -1), nullptr);
  SaliencyParams cut = layer.params();
  cut.keys.head_stride = cut.keys.tokens * cut.keys.dim;
  cut.keys.tokens = 500;  // runs of 64,000 bytes
  EXPECT_EQ(backend_->Stage(cut, -1), nullptr);
  SaliencyParams wrong = layer.params();
  wrong.queries.dim = 32;
  EXPECT_EQ(backend_->Stage(wrong, -1), nullptr);
  // Two for each lane.
  std::vector<std::unique_ptr<StagedLayer>> all;
  for (int i = 0; i < 2 * cuda::DeviceOptions().lanes; ++i) {
    all.push_back(backend_->Stage(layer.params(), -1));
    EXPECT_NE(all.back(), nullptr);
  }
  EXPECT_EQ(backend_->Stage(layer.params(), -1), nullptr);
  all.pop_back();
  EXPECT_NE(backend_->Stage(layer.params(), -1), nullptr);
  all.clear();
  EXPECT_EQ(UsedBytes(), 0);
}

// The memory is that of whoever computes: what is staged goes, without a wait, and its own call
// does without.
TEST_F(StagedTest, WhatIsStagedMakesRoomForCalls) {
  const Layer first(7, Layout::kHeadTokenDim);
  const Layer second(8, Layout::kHeadTokenDim);
  const Outcome wanted_first = first.Run(*backend_, nullptr);
  const Outcome wanted_second = second.Run(*backend_, nullptr);
  Start(Pool(LeastPool(second)));
  const std::unique_ptr<StagedLayer> staged = backend_->Stage(first.params(), -1);
  ASSERT_NE(staged, nullptr);
  FakeCuda::TakeLog();
  EXPECT_EQ(second.Run(*backend_, nullptr), wanted_second);
  const std::vector<FakeWork> log = FakeCuda::TakeLog();
  // The copies that were under way have ended before anything else came to the same memory.
  ASSERT_GE(log.size(), 2U);
  EXPECT_EQ(BytesTo({log[0], log[1]}, log[0].stream), kKeyBytes);
  EXPECT_EQ(std::count_if(log.begin(), log.end(),
                          [&](const FakeWork& work) { return work.stream == log[0].stream; }),
            2);
  EXPECT_EQ(first.Run(*backend_, staged.get()), wanted_first);
}

// Its own call as well: the rest of what that takes has no room beside the keys.
TEST_F(StagedTest, WhatIsInTheWayOfItsOwnCallGoes) {
  const Layer layer(9, Layout::kHeadTokenDim);
  const Outcome wanted = layer.Run(*backend_, nullptr);
  const int64_t least = LeastPool(layer);
  for (const int64_t bytes : {least, least + 8192, 2 * least}) {
    Start(Pool(bytes));
    const std::unique_ptr<StagedLayer> staged = backend_->Stage(layer.params(), -1);
    EXPECT_EQ(layer.Run(*backend_, staged.get()), wanted) << bytes;
    EXPECT_EQ(UsedBytes(), 0);
  }
}

// Prompts that all stage their next layer and compute one, on a pool for hardly more than a layer:
// none waits for what another one has staged.
TEST_F(StagedTest, PromptsNeverWaitForWhatIsStaged) {
  constexpr int kPrompts = 6;
  constexpr int kLayers = 5;
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<Outcome> wanted;
  for (int i = 0; i < 2; ++i) {
    layers.push_back(std::make_unique<Layer>(10 + i, Layout::kHeadTokenDim));
    wanted.push_back(layers.back()->Run(*backend_, nullptr));
  }
  const int64_t least = LeastPool(*layers[0]);
  for (const int64_t bytes : {least, 2 * least}) {
    cuda::DeviceOptions options = Pool(bytes);
    options.lanes = 3;
    options.wait_limit = std::chrono::seconds(60);
    Start(options);
    const auto begun = std::chrono::steady_clock::now();
    std::atomic<int> staged_count{0};
    std::vector<std::thread> prompts;
    for (int prompt = 0; prompt < kPrompts; ++prompt) {
      prompts.emplace_back([&] {
        std::unique_ptr<StagedLayer> next;
        for (int i = 0; i < kLayers; ++i) {
          const std::unique_ptr<StagedLayer> staged = std::move(next);
          next = backend_->Stage(layers[(i + 1) % 2]->params(), -1);
          if (next != nullptr) ++staged_count;
          EXPECT_EQ(layers[i % 2]->Run(*backend_, staged.get()), wanted[i % 2]);
        }
      });
    }
    for (std::thread& prompt : prompts) prompt.join();
    EXPECT_LT(std::chrono::steady_clock::now() - begun, options.wait_limit) << "a wait ran out";
    EXPECT_GT(staged_count, 0);
    EXPECT_EQ(UsedBytes(), 0);
  }
}

TEST_F(StagedTest, KeysGoWhereMostMemoryIsFree) {
  backend_.reset();
  FakeCuda::Reset({.count = 2});
  Start({.memory_bytes = 64 * kMiB, .slice_bytes = 4096});
  const Layer layer(12, Layout::kHeadTokenDim);
  const std::unique_ptr<StagedLayer> on_first = backend_->Stage(layer.params(), -1);
  const std::unique_ptr<StagedLayer> on_second = backend_->Stage(layer.params(), -1);
  for (const BackendStats::Gpu& gpu : backend_->stats().gpus) {
    EXPECT_EQ(gpu.calls.used_bytes, cuda::ArenaSize(kKeyBytes)) << gpu.index;
  }
  layer.Run(*backend_, on_second.get());
  EXPECT_GT(FakeCuda::kernels(1), 0);
  EXPECT_EQ(FakeCuda::kernels(0), 0) << "the call goes where its keys are";
}

TEST_F(StagedTest, KeysGoToTheGpuThatIsAskedFor) {
  backend_.reset();
  FakeCuda::Reset({.count = 2});
  Start({.memory_bytes = 64 * kMiB, .slice_bytes = 4096});
  const Layer layer(12, Layout::kHeadTokenDim);
  std::vector<std::unique_ptr<StagedLayer>> staged;
  for (int64_t i = 1; i <= 2; ++i) {
    staged.push_back(backend_->Stage(layer.params(), 1));
    EXPECT_NE(staged.back(), nullptr);
    EXPECT_EQ(backend_->stats().gpus[0].calls.used_bytes, 0);
    EXPECT_EQ(backend_->stats().gpus[1].calls.used_bytes, i * cuda::ArenaSize(kKeyBytes));
  }
}

// Whichever call of the runtime fails, the layer's own call succeeds or says so, and nothing leaks.
TEST_F(StagedTest, FailuresLeaveNothingBehind) {
  const Layer layer(13, Layout::kHeadTokenDim);
  const Outcome wanted = layer.Run(*backend_, nullptr);
  for (int64_t n = 0;; ++n) {
    const int64_t before = FakeCuda::calls();
    FakeCuda::FailCall(n, cudaErrorInvalidValue);
    std::unique_ptr<StagedLayer> staged = backend_->Stage(layer.params(), -1);
    FakeCuda::FailCall(-1, cudaSuccess);
    const bool failed = FakeCuda::calls() - before > n;
    EXPECT_EQ(layer.Run(*backend_, staged.get()), wanted) << n;
    staged.reset();
    EXPECT_EQ(UsedBytes(), 0) << n;
    if (!failed) break;
    ASSERT_LT(n, 100);
  }
  // A lost backend stages nothing, and what was staged goes.
  std::unique_ptr<StagedLayer> staged = backend_->Stage(layer.params(), -1);
  FakeCuda::FailCall(0, cudaErrorIllegalAddress);
  std::vector<float> out(static_cast<size_t>(kShape.kv_heads * kShape.tokens));
  EXPECT_EQ(backend_->Saliency(layer.params(), out.data(), nullptr, SerialFor).code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(backend_->Stage(layer.params(), -1), nullptr);
  staged.reset();
}

}  // namespace
}  // namespace structkv
