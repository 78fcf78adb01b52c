// The client library over shared memory and a real server: what it collects is what it collects
// inline, to the byte, and what a client leaves behind comes back, whatever ends it.
#include <algorithm>
#include <csignal>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/arena.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "structkv/sizes.h"
#include "tests/e2e/client_prompt.h"
#include "tests/testing/process.h"
#include "tests/testing/prompt_cases.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;

constexpr size_t kRegionBytes = size_t{32} << 20;

std::shared_ptr<client::Arena> NewArena(size_t bytes = kRegionBytes,
                                        client::RegionKind kind = client::RegionKind::kDescriptor) {
  client::RegionOptions options;
  options.size_bytes = bytes;
  options.kind = kind;
  options.lease = kind == client::RegionKind::kNamed ? absl::Milliseconds(300) : absl::Duration();
  const auto region = client::Region::Create(options);
  EXPECT_TRUE(region.ok()) << region.status();
  return std::make_shared<client::Arena>(*region);
}

// A layer whose tensors all lie in the arena.
absl::StatusOr<client::LayerTensors> LayerIn(client::Arena* arena, const PromptData& data,
                                             uint32_t layer) {
  client::LayerTensors tensors = TensorsOf(data, layer);
  auto blocks = std::make_shared<std::vector<client::Bytes>>();
  for (absl::Span<const std::byte>* span :
       {&tensors.keys, &tensors.values, &tensors.window_queries, &tensors.window_lse,
        &tensors.saliency, &tensors.key_scales, &tensors.value_scales}) {
    if (span->empty()) continue;
    absl::StatusOr<client::Bytes> block = arena->Allocate(span->size());
    if (!block.ok()) return block.status();
    std::copy(span->begin(), span->end(), block->data());
    *span = block->span();
    blocks->push_back(*std::move(block));
  }
  tensors.owner = blocks;
  return tensors;
}

class ClientSharedMemoryTest : public ServiceTest {
 protected:
  ClientSharedMemoryTest() : options_(TestOptions()) {
    options_.regions.socket.path = directory_.Path("regions");
  }

  void Start() {
    ServiceTest::Start(options_);
    client_ = *client::Client::Connect(target());
  }

  // What a session is to use, all of one region.
  static client::SessionOptions In(const std::shared_ptr<client::Arena>& arena) {
    client::SessionOptions options;
    options.transport = client::TransportChoice::kSharedMemory;
    options.regions = {arena->region()};
    options.results = arena;
    return options;
  }

  absl::StatusOr<client::Compressed> Inline(const PromptData& data, const v1::Open& open) {
    client::SessionOptions options;
    return client::CompressPrompt(
        *client_, open,
        [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
          return TensorsOf(data, layer);
        },
        options);
  }

  absl::StatusOr<client::Compressed> Shared(const PromptData& data, const v1::Open& open,
                                            const std::shared_ptr<client::Arena>& arena,
                                            const client::SessionOptions& options) {
    return client::CompressPrompt(
        *client_, open, [&](uint32_t layer) { return LayerIn(arena.get(), data, layer); }, options);
  }

  // Nothing of clients is registered or mapped at the server, but for `regions`.
  void ExpectRegions(int64_t regions) {
    EXPECT_TRUE(Eventually([&] { return server().regions()->regions() == regions; }));
    EXPECT_EQ(server().regions()->mapped_bytes() == 0, regions == 0);
  }

  TemporaryDirectory directory_;
  ServerOptions options_;
  std::unique_ptr<client::Client> client_;
};

TEST_F(ClientSharedMemoryTest, CollectsWhatMessagesGiveOfPromptsOfEveryKind) {
  Start();
  const auto arena = NewArena();
  for (const PromptCase& test : PromptCases()) {
    SCOPED_TRACE(test.name);
    const PromptData data(test.open, 41);
    const auto inline_result = Inline(data, data.open());
    ASSERT_TRUE(inline_result.ok()) << inline_result.status();
    EXPECT_EQ(inline_result->opened.transport(), v1::TRANSPORT_INLINE);
    const auto& kept = inline_result->opened.kept_tokens();
    EXPECT_GE(client::MostKeptTokens(data.open()), *std::max_element(kept.begin(), kept.end()));
    client::SessionOptions options = In(arena);
    for (const bool results : {true, false}) {
      if (!results) options.results = nullptr;
      const auto shared = Shared(data, data.open(), arena, options);
      ASSERT_TRUE(shared.ok()) << shared.status();
      EXPECT_TRUE(Text(*shared) == Text(*inline_result));
      EXPECT_EQ(shared->summary.transport(), "shared_memory");
      EXPECT_EQ(shared->summary.input_bytes(), inline_result->summary.input_bytes());
      EXPECT_EQ(shared->summary.output_bytes(), inline_result->summary.output_bytes());
      for (const client::LayerResult& layer : shared->layers) {
        if (layer.keys.empty()) continue;
        EXPECT_EQ(arena->region()->OffsetOf(layer.keys.span()).has_value(), results);
      }
    }
    EXPECT_EQ(arena->free_bytes(), kRegionBytes);
  }
}

TEST_F(ClientSharedMemoryTest, OfTensorsElsewhereByStaging) {
  Start();
  const PromptData data(SmallOpen(3000), 43);
  const auto whole = Inline(data, data.open());
  ASSERT_TRUE(whole.ok());
  client::SessionOptions options;
  options.staging = NewArena(2 << 20);  // less than a prompt, more than a layer
  const auto staged = client::CompressPrompt(
      *client_, data.open(),
      [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
        return TensorsOf(data, layer);
      },
      options);
  ASSERT_TRUE(staged.ok()) << staged.status();
  EXPECT_EQ(staged->opened.transport(), v1::TRANSPORT_SHARED_MEMORY);
  EXPECT_TRUE(Text(*staged) == Text(*whole));
  EXPECT_EQ(options.staging->free_bytes(), 2 << 20);
}

// Two prompts share a staging arena that has room for one's layer at a time.
TEST_F(ClientSharedMemoryTest, StagingThatAnotherPromptFillsIsWaitedFor) {
  Start();
  const PromptData data(SmallOpen(3000), 43);
  client::SessionOptions options;
  const auto arena = NewArena(4 << 20);
  const size_t layer_bytes =
      data.tensor(0, v1::TENSOR_KEYS).size() + data.tensor(0, v1::TENSOR_VALUES).size();
  options.staging = NewArena((layer_bytes + 4095) / 4096 * 4096);
  options.regions = {arena->region()};
  auto first = client_->OpenPrompt(data.open(), options);
  auto second = client_->OpenPrompt(data.open(), options);
  ASSERT_TRUE(first.ok() && second.ok()) << first.status() << second.status();
  client::LayerTensors keys = TensorsOf(data, 0);
  keys.values = {};
  ASSERT_TRUE((*first)->SendLayer(0, keys).ok());
  absl::Status sent = absl::UnknownError("");
  std::thread sender([&] { sent = (*second)->SendLayer(0, TensorsOf(data, 0)); });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  // The rest of the first one's layer lies in a region; its answer lets go of the keys.
  client::LayerTensors values;
  const absl::Span<const std::byte> from = AsBytes(data.tensor(0, v1::TENSOR_VALUES));
  const client::Bytes block = *arena->Allocate(from.size());
  std::copy(from.begin(), from.end(), block.data());
  values.values = block.span();
  EXPECT_TRUE((*first)->SendLayer(0, values).ok());
  EXPECT_TRUE((*first)->NextEvent().ok());
  sender.join();
  EXPECT_TRUE(sent.ok()) << sent;
  EXPECT_TRUE((*second)->NextEvent().ok());
  // Nobody else has any of it: a layer that never fits is an error at once.
  const client::Bytes rest = *options.staging->Allocate(options.staging->free_bytes() - 64);
  const absl::Time start = absl::Now();
  EXPECT_TRUE(absl::IsResourceExhausted((*first)->SendLayer(1, TensorsOf(data, 1))));
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
}

TEST_F(ClientSharedMemoryTest, PullsRowsThroughStaging) {
  Start();
  for (const v1::Statistic statistic :
       {v1::STATISTIC_WINDOW_QUERIES, v1::STATISTIC_SALIENCY_PER_KV_HEAD}) {
    v1::Open open = SmallOpen(500);
    open.set_statistic(statistic);
    const PromptData data(open, 47);
    const auto whole = Inline(data, open);
    ASSERT_TRUE(whole.ok()) << whole.status();
    open.set_pull(statistic == v1::STATISTIC_WINDOW_QUERIES ? v1::PULL_VALUES
                                                            : v1::PULL_KEYS_AND_VALUES);
    const auto arena = NewArena();
    client::SessionOptions options = In(arena);
    EXPECT_EQ(Shared(data, open, arena, options).status().code(),
              absl::StatusCode::kInvalidArgument);
    options.staging = arena;
    const auto pulled = Shared(data, open, arena, options);
    ASSERT_TRUE(pulled.ok()) << pulled.status();
    EXPECT_TRUE(Text(*pulled) == Text(*whole));
    EXPECT_LT(pulled->summary.input_bytes(), whole->summary.input_bytes());
    EXPECT_EQ(pulled->summary.transport(), "shared_memory");
  }
}

TEST_F(ClientSharedMemoryTest, OfSkeletonRowsInSteps) {
  Start();
  v1::Open open = SmallOpen(400);
  open.mutable_geometry()->set_layer_count(8);
  v1::StructKvMethod* method = open.mutable_method()->mutable_structkv();
  method->mutable_pivot()->set_mode(v1::PIVOT_MODE_FIXED);
  method->mutable_pivot()->set_fixed_layer(3);
  const auto arena = NewArena();
  std::map<bool, std::string> texts;
  for (const bool shared : {false, true}) {
    PromptData data(open, 53);
    client::SessionOptions options = shared ? In(arena) : client::SessionOptions();
    options.on_event = [&](const client::Event& event) {
      const auto* layer = std::get_if<client::LayerResult>(&event);
      if (layer != nullptr) texts[shared] += Text(*layer);
    };
    const auto source = [&](uint32_t layer, const client::PivotResult* pivot) {
      if (pivot != nullptr && layer >= *pivot->skeleton_from_layer) {
        data.KeepRows(layer, pivot->skeleton);
      }
      return LayerIn(arena.get(), data, layer);
    };
    const auto summary = client::StreamPromptInSteps(*client_, open, source, options);
    ASSERT_TRUE(summary.ok()) << summary.status();
    EXPECT_EQ(summary->transport(), shared ? "shared_memory" : "inline");
  }
  EXPECT_FALSE(texts[false].empty());
  EXPECT_TRUE(texts[true] == texts[false]);
}

TEST_F(ClientSharedMemoryTest, PromptsOfABatchShareTheRegion) {
  Start();
  const auto arena = NewArena();
  std::vector<PromptData> prompts;
  for (const uint32_t tokens : {300, 70, 411}) prompts.emplace_back(SmallOpen(tokens), tokens);
  std::vector<std::string> texts(prompts.size());
  std::vector<client::BatchPrompt> batch;
  client::SessionOptions options = In(arena);
  for (size_t i = 0; i < prompts.size(); ++i) {
    options.on_event = [&texts, i](const client::Event& event) {
      const auto* layer = std::get_if<client::LayerResult>(&event);
      if (layer != nullptr) texts[i] += Text(*layer);
    };
    batch.push_back({prompts[i].open(), options});
  }
  const auto summaries = client::StreamBatch(
      *client_, batch,
      [&](size_t i, uint32_t layer) { return LayerIn(arena.get(), prompts[i], layer); }, options);
  for (size_t i = 0; i < prompts.size(); ++i) {
    ASSERT_TRUE(summaries[i].ok()) << summaries[i].status();
    EXPECT_EQ(summaries[i]->transport(), "shared_memory");
    const auto whole = Inline(prompts[i], prompts[i].open());
    ASSERT_TRUE(whole.ok());
    std::string text;
    for (const client::LayerResult& layer : whole->layers) text += Text(layer);
    EXPECT_TRUE(texts[i] == text);
  }
}

// Longer than its lease: a thread renews it.
TEST_F(ClientSharedMemoryTest, ANamedRegionLivesAsLongAsItsObject) {
  Start();
  auto arena = NewArena(1 << 20, client::RegionKind::kNamed);
  ASSERT_TRUE(client_->Register(*arena->region()).ok());
  absl::SleepFor(absl::Milliseconds(700));
  const PromptData data(SmallOpen(), 59);
  const auto whole = Inline(data, data.open());
  absl::StatusOr<client::Compressed> shared = Shared(data, data.open(), arena, In(arena));
  ASSERT_TRUE(shared.ok()) << shared.status();
  EXPECT_TRUE(Text(*shared) == Text(*whole));
  arena.reset();
  ExpectRegions(1);  // results hold it
  shared = absl::UnknownError("dropped");
  ExpectRegions(0);
}

TEST_F(ClientSharedMemoryTest, RoomOfACancelledPromptComesBackOnceTheServerHasLetGo) {
  Start();
  const auto arena = NewArena(1 << 20);
  const PromptData data(SmallOpen(), 61);
  for (int i = 0; i < 20; ++i) {
    auto session = client_->OpenPrompt(data.open(), In(arena));
    ASSERT_TRUE(session.ok()) << session.status();
    ASSERT_TRUE((*session)->SendLayer(0, *LayerIn(arena.get(), data, 0)).ok());
    (*session)->Cancel();
    session->reset();
    EXPECT_LT(arena->free_bytes(), 1 << 20) << "held back";
    ExpectMemoryBack();
  }
  const auto shared = Shared(data, data.open(), arena, In(arena));
  ASSERT_TRUE(shared.ok()) << shared.status();
  const auto whole = Inline(data, data.open());
  EXPECT_TRUE(Text(*shared) == Text(*whole));
}

// The neighbour runs on, undisturbed (see ServiceTest).
TEST_F(ClientSharedMemoryTest, AKilledClientLeavesNothingBehind) {
  Start();
  const std::set<std::string> before = RegionNames();
  for (const char* kind : {"descriptor", "named"}) {
    for (int i = 0; i < 3; ++i) {
      Process client({STRUCTKV_CLIENT_REGION_PEER, target(), kind});
      ASSERT_TRUE(client.WaitForLine("sent")) << client.error();
      ExpectRegions(1);
      client.Signal(SIGKILL);
      client.Wait();
      ExpectRegions(0);
      ExpectMemoryBack();
      EXPECT_TRUE(NoOtherRegionNames(before));
    }
  }
}

TEST_F(ClientSharedMemoryTest, AServerThatComesBackGetsTheRegionAgain) {
  const std::vector<std::string> command = {STRUCTKV_SERVER, "--listen",
                                            "unix:" + directory_.Path("grpc"), "--region-socket",
                                            directory_.Path("regions")};
  auto server = std::make_unique<Process>(command);
  ASSERT_TRUE(server->WaitForLine("ready")) << server->error();
  client_ = *client::Client::Connect("unix:" + directory_.Path("grpc"));
  const auto arena = NewArena();
  const PromptData data(SmallOpen(), 67);
  const auto before = Shared(data, data.open(), arena, In(arena));
  ASSERT_TRUE(before.ok()) << before.status();
  auto session = client_->OpenPrompt(data.open(), In(arena));
  ASSERT_TRUE(session.ok()) << session.status();
  server->Signal(SIGKILL);
  server->Wait();
  EXPECT_EQ((*session)->Wait().status().code(), absl::StatusCode::kUnavailable);
  client::SessionOptions once = In(arena);
  once.retry.max_attempts = 1;
  EXPECT_EQ(client_->OpenPrompt(data.open(), once).status().code(), absl::StatusCode::kUnavailable);
  const absl::Status away = client_->Register(*arena->region());
  EXPECT_EQ(away.code(), absl::StatusCode::kUnavailable);
  server = std::make_unique<Process>(command);
  ASSERT_TRUE(server->WaitForLine("ready")) << server->error();
  client::SessionOptions patient = In(arena);
  patient.retry.max_attempts = 20;
  const auto after = Shared(data, data.open(), arena, patient);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_TRUE(Text(*after) == Text(*before));
}

}  // namespace
}  // namespace structkv::testkit
