// Prompts whose keys and values come from another GPU by NCCL, on the fake library and the fake
// CUDA runtime: answered as those that travel in messages, to the byte.
#include "tests/testing/nccl_test.h"

#include <csignal>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "structkv/v1/compression.grpc.pb.h"
#include "structkv/v1/held_cache.grpc.pb.h"
#include "tests/testing/held.h"
#include "tests/testing/prompt_cases.h"
#include "tests/testing/shards.h"

namespace structkv::testkit {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

v1::GetCapabilitiesResponse Capabilities(const std::shared_ptr<grpc::Channel>& channel) {
  grpc::ClientContext context;
  v1::GetCapabilitiesResponse response;
  v1::Compression::NewStub(channel)->GetCapabilities(&context, {}, &response);
  return response;
}

class NcclKindsTest : public NcclTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(NcclKindsTest, IsAnsweredAsInline) {
  StartNccl();
  const PromptData data(FindCase(GetParam()).open, 41);
  const std::string expected = Inline(data);
  NcclClient client(channel(), "client");
  NcclPrompt prompt(data, &client);
  const Outcome outcome = prompt.Run(channel());
  ExpectResult(outcome, expected);
  for (const v1::CompressResponse& response : outcome.responses) {
    if (!response.has_opened()) continue;
    EXPECT_EQ(response.opened().transport(), v1::TRANSPORT_NCCL);
  }
}

INSTANTIATE_TEST_SUITE_P(, NcclKindsTest,
                         ::testing::Values("StructKv", "StructKvPerKvHead", "StructKvLatent",
                                           "StructKvValuesInKeys", "StructKvFp8", "StructKvPaged",
                                           "StructKvPlan", "StructKvKeepsAll", "FullPaged"),
                         [](const auto& instance) { return std::string(instance.param); });

TEST_F(NcclTest, RowsTravelByTransfersAlone) {
  StartNccl();
  const PromptData data(SmallOpen(), 3);
  NcclClient client(channel(), "client");
  NcclPrompt prompt(data, &client);
  Call call(channel());
  for (uint32_t layer = 0; layer < data.layers(); ++layer) prompt.Offer(layer);
  for (const v1::CompressRequest& message : prompt.Messages()) call.Send(message);
  call.HalfClose();
  // Nothing is taken: two layers are answered, and the rest waits.
  ASSERT_TRUE(call.WaitForLayer(1));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  uint64_t layers = 0;
  for (const v1::CompressResponse& response : call.ResponsesFrom(0)) {
    EXPECT_FALSE(response.has_summary());
    if (!response.has_layer()) continue;
    ++layers;
    for (const v1::TensorPiece& piece : response.layer().pieces()) {
      const bool rows = piece.tensor() == v1::TENSOR_KEYS || piece.tensor() == v1::TENSOR_VALUES;
      EXPECT_EQ(piece.has_transfer(), rows);
    }
  }
  EXPECT_EQ(layers, 2U);
  ExpectResult(prompt.Finish(&call), Inline(data));
}

TEST_F(NcclTest, HeldInTheService) {
  StartNccl();
  const PromptData data(Held(SmallOpen()), 3);
  NcclClient client(channel(), "client");
  NcclPrompt prompt(data, &client);
  std::vector<std::string> results;
  for (const Outcome& outcome : {prompt.Run(channel()), Run(AllMessages(data))}) {
    ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    const std::string handle = Assemble(outcome).summary->held().handle();
    const Fetched fetched = Fetch(channel(), FetchRequest(handle));
    EXPECT_TRUE(fetched.status.ok());
    results.push_back(fetched.bytes);
    EXPECT_TRUE(Release(channel(), handle).ok());
  }
  EXPECT_FALSE(results[0].empty());
  EXPECT_TRUE(results[0] == results[1]);
}

TEST_F(NcclTest, OfSkeletonRows) {
  StartNccl();
  v1::Open open = SmallOpen(120);
  v1::Pivot* pivot = open.mutable_method()->mutable_structkv()->mutable_pivot();
  pivot->set_mode(v1::PIVOT_MODE_FIXED);
  pivot->set_fixed_layer(1);
  PromptData data(open, 5);
  Call first(channel());
  for (const v1::CompressRequest& message : AllMessages(data)) first.Send(message);
  ASSERT_TRUE(first.WaitForLayer(1));
  const std::vector<int32_t> skeleton = first.Skeleton();
  ASSERT_FALSE(skeleton.empty());
  for (uint32_t layer = 2; layer < data.layers(); ++layer) data.KeepRows(layer, skeleton);
  const auto send = [&](Call* call, const std::vector<v1::CompressRequest>& messages) {
    for (size_t i = 0; i < messages.size(); ++i) {
      call->Send(messages[i]);
      const bool answered = i != 2 || call->WaitForLayer(1);
      EXPECT_TRUE(answered);
    }
    call->HalfClose();
  };
  Call in_messages(channel());
  send(&in_messages, AllMessages(data));
  const std::string expected = ResultBytes(Assemble(in_messages.Finish()));
  NcclClient client(channel(), "client");
  NcclPrompt prompt(data, &client);
  for (uint32_t layer = 0; layer < data.layers(); ++layer) prompt.Offer(layer);
  Call call(channel());
  send(&call, prompt.Messages());
  ExpectResult(prompt.Finish(&call), expected);
}

TEST_F(NcclTest, ManyLayersInFlightAndAnyOrder) {
  StartNccl();
  v1::Open open = SmallOpen();
  open.set_layers_in_flight(4);
  const PromptData data(open, 9);
  const std::string expected = Inline(data);
  NcclClient client(channel(), "client");
  NcclPrompt prompt(data, &client);
  const std::vector<v1::CompressRequest> messages = prompt.Messages();
  Call call(channel());
  for (const v1::CompressRequest& message : messages) {
    if (message.has_commit()) call.Send(messages[2]);  // is known
    call.Send(message);
  }
  call.HalfClose();
  for (uint32_t layer = data.layers(); layer-- > 0;) prompt.Offer(layer);
  ExpectResult(prompt.Finish(&call), expected);
}

TEST_F(NcclTest, PromptsOfABatch) {
  StartNccl();
  const PromptData one(SmallOpen(100), 1);
  const PromptData other(SmallOpen(150), 2);
  NcclClient client(channel(), "client");
  NcclPrompt prompts[] = {NcclPrompt(one, &client), NcclPrompt(other, &client)};
  Call call(channel());
  for (uint32_t i = 0; i < 2; ++i) {
    for (uint32_t layer = 0; layer < one.layers(); ++layer) prompts[i].Offer(layer);
    for (v1::CompressRequest message : prompts[i].Messages()) {
      message.set_prompt(i);
      if (message.has_open()) message.mutable_open()->set_batch_prompt_count(2);
      call.Send(message);
    }
  }
  call.HalfClose();
  for (size_t seen = 0; call.WaitForResponses(seen + 1);) {
    for (const v1::CompressResponse& response : call.ResponsesFrom(seen++)) {
      prompts[response.prompt()].Take(response);
      break;
    }
  }
  const Outcome both = call.Finish();
  const std::string expected[] = {Inline(one), Inline(other)};
  for (uint32_t i = 0; i < 2; ++i) {
    Outcome own = both;
    std::erase_if(own.responses, [i](const auto& response) { return response.prompt() != i; });
    ExpectResult(prompts[i].Get(own), expected[i]);
  }
}

TEST_F(NcclTest, OfTensorParallelRanks) {
  StartNccl();
  const PromptData whole(SmallOpen(120), 3);
  const Answer answer = Assemble(Run(AllMessages(whole)));
  const std::vector<PromptData> parts = SplitByRanks(whole, 2);
  std::vector<Outcome> outcomes(parts.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < parts.size(); ++i) {
    threads.emplace_back([&, i] {
      const auto own = NewChannel(target());
      NcclClient client(own, "rank" + std::to_string(i));
      NcclPrompt prompt(parts[i], &client);
      outcomes[i] = prompt.Run(own);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < parts.size(); ++i) {
    SCOPED_TRACE(i);
    ASSERT_TRUE(outcomes[i].status.ok()) << outcomes[i].status.error_message();
    EXPECT_TRUE(
        ResultBytesOfLayers(Assemble(outcomes[i])) ==
        ResultBytesOfLayers(SliceAnswer(whole.open(), answer, parts[i].open().shard_group())));
  }
}

TEST_F(NcclTest, SeveralPromptsOfAPairAndOfOthers) {
  StartNccl();
  const PromptData data(SmallOpen(), 3);
  const std::string expected = Inline(data);
  NcclClient shared(channel(), "shared");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      const auto own = NewChannel(target());
      std::unique_ptr<NcclClient> client;
      if (i >= 2) client = std::make_unique<NcclClient>(own, "host" + std::to_string(i));
      NcclPrompt prompt(data, client == nullptr ? &shared : client.get());
      ExpectResult(prompt.Run(own), expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Pairs are spread over the GPUs, and their prompts' tensors lie where their pair is.
TEST_F(NcclTest, TwoGpus) {
  structkv::testing::FakeCuda::Reset({.count = 2});
  StartNccl();
  const Backend& backend = server().sessions().backend();
  ASSERT_THAT(backend.gpus(), ElementsAre(0, 1));
  const auto all_free = [&backend](int gpu) {
    return backend.Reserve(gpu, backend.reservable_bytes(gpu)).ok();
  };
  const PromptData data(SmallOpen(), 3);
  const std::string expected = Inline(data);
  NcclClient first(channel(), "first");
  NcclClient second(NewChannel(target()), "second");
  for (const int gpu : {0, 1}) {
    NcclClient* const client = gpu == 0 ? &first : &second;
    NcclPrompt opened(data, client);
    Call call(channel());
    call.Send(opened.Messages()[0]);
    ASSERT_TRUE(call.WaitForOpened().has_value());
    EXPECT_FALSE(all_free(gpu));
    EXPECT_TRUE(all_free(1 - gpu));
    call.Cancel();
    call.Finish();
    EXPECT_TRUE(Eventually([&] { return all_free(gpu); }));
    NcclPrompt whole(data, client);
    ExpectResult(whole.Run(channel()), expected);
  }
}

// Of both sides.
TEST(NcclProcessTest, ServesAClientAndDrains) {
  Process server({STRUCTKV_GPU_SERVER, "--listen", "127.0.0.1:0", "--device-memory", "128MiB",
                  "--nccl-library", STRUCTKV_FAKE_NCCL, "--nccl-memory", "16MiB"});
  const std::optional<std::string> line = server.WaitForLine("listening on ");
  ASSERT_TRUE(line.has_value()) << server.error();
  const std::string target = line->substr(line->find("127."));
  Process client({STRUCTKV_NCCL_CLIENT, target, std::to_string(nccl::WorkerOptions().group_bytes)});
  EXPECT_EQ(client.Wait(std::chrono::seconds(60)), 0) << client.output() << client.error();
  EXPECT_THAT(client.output(), HasSubstr("same"));
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0) << server.error();
  EXPECT_THAT(server.error(), HasSubstr("transport=nccl"));
}

TEST_F(NcclTest, CapabilitiesNameIt) {
  StartNccl();
  const v1::GetCapabilitiesResponse response = Capabilities(channel());
  EXPECT_THAT(response.transports(), ElementsAre("inline", "nccl"));
  EXPECT_EQ(response.missing_transports_size(), 0);
}

// Starts, serves, and says why everywhere.
TEST_F(NcclTest, AHostWithoutNccl) {
  ServerOptions options = Options();
  options.nccl.library = "libnosuchnccl.so.2";
  StartAlone(options, structkv::testing::MakeFakeBackend());
  EXPECT_THAT(std::string(server().nccl_status().message()), HasSubstr("libnosuchnccl.so.2"));
  const v1::GetCapabilitiesResponse response = Capabilities(channel());
  EXPECT_THAT(response.transports(), Not(Contains("nccl")));
  EXPECT_THAT(response.missing_transports(),
              ElementsAre(HasSubstr("nccl: no NCCL: libnosuchnccl.so.2")));
  const PromptData data(SmallOpen(100), 6);
  std::vector<v1::CompressRequest> messages = AllMessages(data);
  messages[0].mutable_open()->add_transports(v1::TRANSPORT_NCCL);
  ExpectFailure(Run(messages), grpc::StatusCode::FAILED_PRECONDITION,
                {"nccl: no NCCL: libnosuchnccl.so.2"});
  messages[0].mutable_open()->add_transports(v1::TRANSPORT_INLINE);
  const Outcome outcome = Run(messages);
  ExpectSuccess(data, outcome);
  EXPECT_THAT(Assemble(outcome).opened->transport_reason(), HasSubstr("libnosuchnccl.so.2"));
}

// A library that is not there costs no memory.
TEST(NcclOptionsTest, MemoryIsSetApartWhereNcclLoads) {
  ServerOptions options;
  options.device_memory_bytes = int64_t{96} << 20;
  options.nccl.library = STRUCTKV_FAKE_NCCL;
  options.nccl.memory_bytes = int64_t{8} << 20;
  const BackendOptions backend = BackendOptionsOf(options);
  EXPECT_EQ(backend.device_memory_bytes, int64_t{96} << 20);
  EXPECT_EQ(backend.reserve_bytes, int64_t{8} << 20);
  options.nccl.library = "libnosuchnccl.so.2";
  EXPECT_EQ(BackendOptionsOf(options).reserve_bytes, std::nullopt);
  options.nccl.library = "";
  EXPECT_EQ(BackendOptionsOf(options).reserve_bytes, std::nullopt);
}

TEST_F(NcclTest, ABackendWithoutGpus) {
  StartAlone(Options(), *cpu::CreateCpuBackend());
  EXPECT_THAT(std::string(server().nccl_status().message()),
              HasSubstr("the backend cpu computes on no GPU"));
}

}  // namespace
}  // namespace structkv::testkit
