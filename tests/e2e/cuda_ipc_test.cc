// Prompts whose keys and values lie in a GPU's memory, that of the fake CUDA runtime: answered as
// those that travel in messages, to the byte. The client is this process, or one of its own.
#include <unistd.h>

#include <csignal>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/imported_memory.h"
#include "tests/e2e/held_test.h"
#include "tests/kernels/cuda/fake_backend.h"
#include "tests/testing/gpu_region.h"
#include "tests/testing/process.h"
#include "tests/testing/prompt_cases.h"
#include "tests/testing/region_test.h"
#include "tests/testing/shards.h"

namespace structkv::testkit {
namespace {

using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;
using structkv::testing::MakeFakeBackend;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// The bytes of keys and values in messages.
uint64_t InlineBytes(const Outcome& outcome) {
  uint64_t bytes = 0;
  for (const v1::CompressResponse& response : outcome.responses) {
    for (const v1::TensorPiece& piece : response.layer().pieces()) {
      const bool rows = piece.tensor() == v1::TENSOR_KEYS || piece.tensor() == v1::TENSOR_VALUES;
      if (rows) bytes += piece.data().size();
    }
  }
  return bytes;
}

class CudaIpcTest : public RegionTest {
 protected:
  void SetUp() override {
    FakeCuda::Reset({.count = 2});
    StartAlone(HoldOptions(Options()), MakeFakeBackend());
    held_ = FakeCuda::held();
  }
  void TearDown() override {
    for (const std::unique_ptr<GpuPrompt>& prompt : prompts_) {
      prompt->region().Unregister(channel());
      ExpectClosed(*prompt);
    }
    prompts_.clear();
    EXPECT_TRUE(Eventually([&] { return mapped_bytes() == 0; }));
    EXPECT_TRUE(Eventually([&] { return files_ == 0 || OpenFiles(getpid()) <= files_; }))
        << OpenFiles(getpid()) << " descriptors, there were " << files_;
    EXPECT_EQ(FakeCuda::held(), held_);
    EXPECT_EQ(FakeCuda::freed_while_open(), 0);
  }
  static void TearDownTestSuite() { EXPECT_EQ(FakeCuda::held(), FakeHeld()); }

  // In this process, which is the server's as well.
  GpuPrompt& Place(const PromptData& data, bool results = true, int gpu = 0) {
    GpuPrompt& prompt = *prompts_.emplace_back(std::make_unique<GpuPrompt>(data, results, gpu));
    const grpc::Status status = prompt.region().Register(channel(), ProcessId());
    EXPECT_TRUE(status.ok()) << status.error_message();
    return prompt;
  }
  void ExpectClosed(GpuPrompt& prompt) {
    EXPECT_TRUE(Eventually(
        [&] { return prompt.region().State(channel()) == v1::REGION_STATE_UNSPECIFIED; }));
  }
  std::string Inline(const PromptData& data) {
    const Outcome outcome = Run(AllMessages(data));
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    return ResultBytes(Assemble(outcome));
  }
  void ExpectSame(const GpuPrompt& prompt, const Outcome& outcome, const std::string& expected) {
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    const Answer answer = Assemble(prompt.Get(outcome));
    EXPECT_THAT(answer.faults, IsEmpty());
    EXPECT_TRUE(ResultBytes(answer) == expected);
    ASSERT_TRUE(answer.opened.has_value() && answer.summary.has_value());
    EXPECT_EQ(answer.opened->transport(), v1::TRANSPORT_CUDA_IPC);
    EXPECT_EQ(answer.summary->transport(), "cuda_ipc");
  }
  grpc::Status Register(const v1::RegisterRegionRequest& request) {
    grpc::ClientContext context;
    v1::RegisterRegionResponse response;
    return Regions()->RegisterRegion(&context, request, &response);
  }
  void ExpectRefused(const v1::RegisterRegionRequest& request, grpc::StatusCode code,
                     const std::string& text) {
    const grpc::Status status = Register(request);
    EXPECT_EQ(status.error_code(), code) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(text));
  }
  // From here on descriptors count: at the end there are no more of them.
  void CountFiles() { files_ = OpenFiles(getpid()); }
  // A client process that does what `mode` says.
  std::unique_ptr<Process> Client(const std::string& mode) {
    return std::make_unique<Process>(std::vector<std::string>{STRUCTKV_IPC_CLIENT, target(), mode});
  }

  FakeHeld held_;
  int64_t files_ = 0;  // 0: they do not count
  std::vector<std::unique_ptr<GpuPrompt>> prompts_;
};

class CudaIpcKindsTest : public CudaIpcTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(CudaIpcKindsTest, IsAnsweredAsInline) {
  const PromptData data(FindCase(GetParam()).open, 41);
  const std::string expected = Inline(data);
  GpuPrompt& in_region = Place(data, ResultRangeBytes(data) > 0);
  const Outcome outcome = Run(in_region.Messages());
  ExpectSame(in_region, outcome, expected);
  EXPECT_EQ(InlineBytes(outcome), 0U);
  GpuPrompt& in_messages = Place(data, /*results=*/false);
  ExpectSame(in_messages, Run(in_messages.Messages()), expected);
}

INSTANTIATE_TEST_SUITE_P(, CudaIpcKindsTest,
                         ::testing::Values("StructKv", "StructKvPerKvHead", "StructKvLatent",
                                           "StructKvValuesInKeys", "StructKvFp8", "StructKvPaged",
                                           "StructKvPlan", "StructKvKeepsAll", "FullPaged"),
                         [](const auto& instance) { return std::string(instance.param); });

TEST_F(CudaIpcTest, KeysThatAreTurned) {
  v1::Open open = SmallOpen(100);
  open.mutable_rotary()->set_rope_theta(10000);
  const PromptData data(open, 3);
  GpuPrompt& prompt = Place(data);
  ExpectSame(prompt, Run(prompt.Messages()), Inline(data));
}

TEST_F(CudaIpcTest, OfSkeletonRows) {
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
  const auto in_order = [&](const std::vector<v1::CompressRequest>& messages) {
    Call call(channel());
    for (size_t i = 0; i < messages.size(); ++i) {
      call.Send(messages[i]);
      const bool answered = i != 2 || call.WaitForLayer(1);
      EXPECT_TRUE(answered);
    }
    call.HalfClose();
    return call.Finish();
  };
  const std::string expected = ResultBytes(Assemble(in_order(AllMessages(data))));
  GpuPrompt& prompt = Place(data);
  ExpectSame(prompt, in_order(prompt.Messages()), expected);
}

// Each on a GPU of its own.
TEST_F(CudaIpcTest, OfTensorParallelRanks) {
  const PromptData whole(SmallOpen(120), 3);
  const Answer answer = Assemble(Run(AllMessages(whole)));
  const std::vector<PromptData> parts = SplitByRanks(whole, 2);
  std::vector<GpuPrompt*> placed;
  std::vector<std::vector<v1::CompressRequest>> messages;
  for (size_t i = 0; i < parts.size(); ++i) {
    placed.push_back(&Place(parts[i], true, static_cast<int>(i)));
    messages.push_back(placed.back()->Messages());
  }
  std::vector<Outcome> outcomes(parts.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < parts.size(); ++i) {
    threads.emplace_back([&, i] { outcomes[i] = testkit::Run(NewChannel(target()), messages[i]); });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < parts.size(); ++i) {
    SCOPED_TRACE(i);
    ASSERT_TRUE(outcomes[i].status.ok()) << outcomes[i].status.error_message();
    EXPECT_EQ(InlineBytes(outcomes[i]), 0U);
    const Answer part = Assemble(placed[i]->Get(outcomes[i]));
    EXPECT_THAT(part.faults, IsEmpty());
    EXPECT_TRUE(
        ResultBytesOfLayers(part) ==
        ResultBytesOfLayers(SliceAnswer(whole.open(), answer, parts[i].open().shard_group())));
  }
}

TEST_F(CudaIpcTest, AnotherProcessExports) {
  const auto client = Client("run");
  EXPECT_EQ(client->Wait(std::chrono::seconds(60)), 0) << client->output() << client->error();
  EXPECT_THAT(client->output(), HasSubstr("same"));
}

// Its kernels never come to the event: that prompt fails, and others do not notice.
TEST_F(CudaIpcTest, AnotherProcessDoesNotWriteWhatItNamed) {
  const PromptData other(SmallOpen(150), 8);
  const std::string undisturbed = Inline(other);
  CountFiles();
  Neighbour neighbour(NewChannel(target()), &other);
  const auto client = Client("stuck");
  EXPECT_EQ(client->Wait(), 0) << client->output() << client->error();
  EXPECT_THAT(client->output(),
              HasSubstr(std::to_string(grpc::StatusCode::DEADLINE_EXCEEDED) +
                        ": open.regions[0]: the exporter's event was not reached"));
  EXPECT_TRUE(ResultBytes(Assemble(neighbour.Finish())) == undisturbed);
}

// What it read and wrote is closed within the lease, and others do not notice.
TEST_F(CudaIpcTest, AnotherProcessIsKilled) {
  const PromptData other(SmallOpen(150), 8);
  const std::string undisturbed = Inline(other);
  CountFiles();
  Neighbour neighbour(NewChannel(target()), &other);
  const auto client = Client("hang");
  ASSERT_TRUE(client->WaitForLine("sent").has_value()) << client->error();
  EXPECT_EQ(FakeCuda::held().imports, 1);
  EXPECT_GT(mapped_bytes(), 0);
  client->Signal(SIGKILL);
  EXPECT_EQ(client->Wait(), 128 + SIGKILL);
  EXPECT_TRUE(Eventually([&] { return FakeCuda::held() == held_; }));
  // Counted after the import is closed.
  EXPECT_TRUE(Eventually([&] { return mapped_bytes() == 0; }));
  EXPECT_TRUE(ResultBytes(Assemble(neighbour.Finish())) == undisturbed);
}

// The lease ends under the running prompt: it goes on, and the memory is held until it is over.
TEST_F(CudaIpcTest, TheLeaseEndsUnderARunningPrompt) {
  const PromptData data(SmallOpen(100), 6);
  const std::string expected = Inline(data);
  GpuPrompt& prompt = *prompts_.emplace_back(std::make_unique<GpuPrompt>(data, true));
  ASSERT_TRUE(prompt.region().Register(channel(), ProcessId(), 3000).ok());
  const std::vector<v1::CompressRequest> messages = prompt.Messages();
  Call call(channel());
  for (size_t i = 0; i + 2 < messages.size(); ++i) call.Send(messages[i]);
  ASSERT_TRUE(call.WaitForLayer(0));
  EXPECT_TRUE(Eventually(
      [&] { return prompt.region().State(channel()) == v1::REGION_STATE_UNREGISTERING; }));
  ExpectFailure(Run(messages), grpc::StatusCode::NOT_FOUND, {"open.regions[0]"});
  for (size_t i = messages.size() - 2; i < messages.size(); ++i) call.Send(messages[i]);
  call.HalfClose();
  ExpectSame(prompt, call.Finish(), expected);
  ExpectClosed(prompt);
}

TEST_F(CudaIpcTest, RegistrationsThatAreRefused) {
  const GpuRegion region(4096);
  const v1::RegisterRegionRequest good = region.Request(std::string(16, 'e'));
  constexpr auto kInvalid = grpc::StatusCode::INVALID_ARGUMENT;
  v1::RegisterRegionRequest bad = good;
  bad.mutable_cuda_ipc()->set_memory_handle("short");
  ExpectRefused(bad, kInvalid, "cuda_ipc.memory_handle has 5 bytes; 64 are allowed");
  bad = good;
  bad.mutable_cuda_ipc()->set_event_handle("short");
  ExpectRefused(bad, kInvalid, "cuda_ipc.event_handle has 5 bytes");
  bad = good;
  bad.mutable_cuda_ipc()->set_exporter_id("");
  ExpectRefused(bad, kInvalid, "cuda_ipc.exporter_id has 0 bytes; 16 are allowed");
  bad = good;
  bad.mutable_cuda_ipc()->set_device_uuid(std::string(16, 'u'));
  ExpectRefused(bad, kInvalid, "that of a GPU which computes here is allowed");
  bad = good;
  bad.set_name("structkv.x");
  ExpectRefused(bad, kInvalid, "name and cuda_ipc are both set");
  bad = good;
  bad.set_lease_millis(1);
  bad.mutable_cuda_ipc()->set_exporter_id(ProcessId());
  ExpectRefused(bad, kInvalid, "lease_millis is 1");
  bad = good;
  bad.mutable_cuda_ipc()->set_memory_handle(std::string(64, 'h'));
  ExpectRefused(bad, grpc::StatusCode::FAILED_PRECONDITION, "cudaIpcOpenMemHandle");
  // In its own process CUDA opens no handle, and who does not know the server's id cannot say so.
  ExpectRefused(good, grpc::StatusCode::FAILED_PRECONDITION, "cudaIpcOpenMemHandle");
  v1::RegisterRegionRequest own = region.Request(ProcessId());
  own.set_size_bytes(4097);
  ExpectRefused(own, kInvalid, "size_bytes is 4097; 1 to 4096");
  own.set_size_bytes(64);
  own.mutable_cuda_ipc()->set_base_address(own.cuda_ipc().base_address() + 256);
  ExpectRefused(own, kInvalid, "is not the begin of its allocation");
  own.mutable_cuda_ipc()->set_base_address(reinterpret_cast<uint64_t>(&own));
  ExpectRefused(own, grpc::StatusCode::FAILED_PRECONDITION, "is not in the memory of GPU 0");
}

TEST_F(CudaIpcTest, PromptsThatAreRefused) {
  const PromptData data(SmallOpen(100), 6);
  GpuPrompt& prompt = Place(data);
  const std::vector<v1::CompressRequest> messages = prompt.Messages();
  constexpr auto kInvalid = grpc::StatusCode::INVALID_ARGUMENT;
  constexpr auto kPrecondition = grpc::StatusCode::FAILED_PRECONDITION;
  const auto piece = [](std::vector<v1::CompressRequest>* all, v1::Tensor tensor) {
    for (v1::TensorPiece& each : *(*all)[1].mutable_pieces()->mutable_pieces()) {
      if (each.tensor() == tensor) return &each;
    }
    return static_cast<v1::TensorPiece*>(nullptr);
  };
  auto bad = messages;
  piece(&bad, v1::TENSOR_KEYS)->set_xxh3_64(5);
  ExpectFailure(Run(bad), kInvalid, {"layer 0, keys", "a checksum"});
  bad = messages;
  *piece(&bad, v1::TENSOR_WINDOW_QUERIES)->mutable_range() = piece(&bad, v1::TENSOR_KEYS)->range();
  ExpectFailure(Run(bad), kInvalid, {"layer 0, window_queries", "other tensors come as `data`"});
  bad = messages;
  piece(&bad, v1::TENSOR_VALUES)->mutable_range()->set_offset_bytes(prompt.region().size());
  ExpectFailure(Run(bad), kInvalid, {"layer 0, values", "range has size_bytes"});
  bad = messages;
  bad[0].mutable_open()->set_transports(0, v1::TRANSPORT_SHARED_MEMORY);
  ExpectFailure(Run(bad), kPrecondition,
                {"shared_memory: open.regions[0] is memory of a GPU, for CUDA IPC"});
  bad = messages;
  bad[0].mutable_open()->add_regions(Place(data, false, 1).region().handle());
  ExpectFailure(Run(bad), kPrecondition, {"open.regions[1] lies on GPU 1 and open.regions[0] on"});
  bad = messages;
  bad[0].mutable_open()->set_pull(v1::PULL_VALUES);
  bad[0].mutable_open()->set_statistic(v1::STATISTIC_SALIENCY);
  bad[0].mutable_open()->clear_result_range();
  ExpectFailure(Run(bad), kPrecondition, {"cuda_ipc: open.pull"});
  RegionConnection connection(socket_path());
  const auto file = SharedFile::Sealed(4096);
  bad = messages;
  bad[0].mutable_open()->set_regions(0, connection.Register(*file).handle());
  bad[0].mutable_open()->clear_result_range();
  ExpectFailure(Run(bad), kPrecondition, {"cuda_ipc: open.regions[0] is memory of the host"});
  ExpectMemoryBack();
  ExpectSame(prompt, Run(messages), Inline(data));
}

// Caches lie in the host's memory; they are fetched into a GPU's.
class CudaIpcHeldTest : public HoldingTest<CudaIpcTest> {};

TEST_F(CudaIpcHeldTest, AreFetchedIntoAGpu) {
  v1::Open open = WideOpen(3000);
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  open.mutable_method()->mutable_full();
  const PromptData data(open, 8);
  const Answer whole = Assemble(Run(AllMessages(data)));
  const std::string handle = Hold(data).summary->held().handle();
  const auto file = SharedFile::Sealed(12 << 20);  // where its bytes are looked at; not shared
  GpuRegion region(file->size(), 1);
  ASSERT_TRUE(region.Register(channel(), ProcessId()).ok());
  for (const uint32_t heads : {4U, 3U}) {
    v1::FetchCacheRequest request = Into(FetchRequest(handle), region.handle(), *file);
    request.set_transports(0, v1::TRANSPORT_CUDA_IPC);
    request.set_kv_head_count(heads);
    request.set_first_kv_head(4 - heads);
    const int64_t before = server().sessions().budget().reserved_bytes();
    // What the first one wrote is what the second one says.
    EXPECT_TRUE(Fetch(channel(), request, {}, file.get()).status.ok());
    EXPECT_EQ(server().sessions().budget().reserved_bytes(), before);
    region.Download(*file);
    const Fetched fetched = Fetch(channel(), request, {}, file.get());
    ExpectSlice(open, whole, fetched, 0, 4, 4 - heads, heads);
    EXPECT_EQ(fetched.summary->transport(), "cuda_ipc");
    EXPECT_EQ(fetched.message_bytes, 4 * 3000 * sizeof(int32_t)) << "positions";
  }
  v1::FetchCacheRequest request = Into(FetchRequest(handle), region.handle(), *file);
  ExpectFetchFailure(Fetch(channel(), request), grpc::StatusCode::FAILED_PRECONDITION,
                     {"shared_memory: regions[0] is memory of a GPU, for CUDA IPC"});
  FakeCuda::FailCall(2, cudaErrorInvalidValue);
  request.set_transports(0, v1::TRANSPORT_CUDA_IPC);
  ExpectFetchFailure(Fetch(channel(), request), grpc::StatusCode::INTERNAL, {"GPU 1", "cuda"});
  EXPECT_TRUE(Fetch(channel(), request, {}, file.get()).status.ok());
  // A fetch's use ends a moment after its last message.
  EXPECT_TRUE(Eventually([&] { return server().active_streams() == 0; }));
  EXPECT_EQ(region.Unregister(channel()), 0);
  EXPECT_TRUE(Release(channel(), handle).ok());
}

class CudaIpcOnCpuTest : public RegionTest {};

TEST_F(CudaIpcOnCpuTest, TheNextWishIsTaken) {
  FakeCuda::Reset({});
  StartAlone(Options(), *cpu::CreateCpuBackend());
  const PromptData data(SmallOpen(100), 6);
  {
    GpuPrompt prompt(data, false);
    const grpc::Status status = prompt.region().Register(channel(), ProcessId());
    EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
    EXPECT_THAT(status.error_message(), HasSubstr("the backend cpu computes in the host's memory"));
  }
  std::vector<v1::CompressRequest> messages = AllMessages(data);
  messages[0].mutable_open()->add_transports(v1::TRANSPORT_CUDA_IPC);
  messages[0].mutable_open()->add_transports(v1::TRANSPORT_INLINE);
  const Outcome outcome = Run(messages);
  ExpectSuccess(data, outcome);
  EXPECT_THAT(Assemble(outcome).opened->transport_reason(), HasSubstr("cuda_ipc: "));
}

}  // namespace
}  // namespace structkv::testkit
