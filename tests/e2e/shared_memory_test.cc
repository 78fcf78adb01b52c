// Prompts whose tensors lie in shared memory: answered as those that travel in messages, to the
// byte, and with nothing but ranges in the messages.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <ostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/prompt_cases.h"
#include "tests/testing/pull.h"
#include "tests/testing/region_test.h"
#include "tests/testing/shards.h"

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

bool IsKeysOrValues(v1::Tensor tensor) {
  return tensor == v1::TENSOR_KEYS || tensor == v1::TENSOR_VALUES;
}

// Bytes of keys and values in messages.
uint64_t InlineBytes(const Outcome& outcome) {
  uint64_t bytes = 0;
  for (const v1::CompressResponse& response : outcome.responses) {
    for (const v1::TensorPiece& piece : response.layer().pieces()) {
      if (IsKeysOrValues(piece.tensor())) bytes += piece.data().size();
    }
  }
  return bytes;
}

class SharedMemoryTest : public RegionTest {
 protected:
  void SetUp() override { StartShared(); }

  // The answer with ranges, which must succeed.
  Answer RunShared(const PromptData& data, bool results, bool keys_and_values = false) {
    Placed placed = Place(data, results);
    const Outcome outcome = Run(Messages(data, &placed, keys_and_values));
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    EXPECT_TRUE(!results || InlineBytes(outcome) == 0) << "rows are in the region";
    const Answer answer = Assemble(placed.ranged->Get(outcome));
    EXPECT_THAT(answer.faults, IsEmpty());
    return answer;
  }
};

class SharedMemoryKindsTest : public SharedMemoryTest,
                              public ::testing::WithParamInterface<PromptCase> {};

void ExpectSame(const Answer& shared, const std::string& expected) {
  EXPECT_TRUE(ResultBytes(shared) == expected);
  ASSERT_TRUE(shared.opened.has_value() && shared.summary.has_value());
  EXPECT_EQ(shared.opened->transport(), v1::TRANSPORT_SHARED_MEMORY);
  EXPECT_EQ(shared.opened->transport_reason(), "");
  EXPECT_EQ(shared.summary->transport(), "shared_memory");
}

TEST_P(SharedMemoryKindsTest, IsAnsweredAsInline) {
  const PromptData data(GetParam().open, 41);
  const Outcome outcome = Run(AllMessages(data));
  ExpectSuccess(data, outcome);
  const Answer whole = Assemble(outcome);
  const std::string expected = ResultBytes(whole);
  const bool results = ResultRangeBytes(data) > 0;
  const Answer shared = RunShared(data, results);
  ExpectSame(shared, expected);
  ExpectSame(RunShared(data, /*results=*/false), expected);
  ExpectSame(RunShared(data, results, /*keys_and_values=*/true), expected);

  uint64_t in_regions = 0;
  for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
    in_regions += data.tensor(0, tensor).size();
  }
  EXPECT_LE(shared.opened->reserved_bytes() + in_regions, whole.opened->reserved_bytes())
      << "nothing is reserved for what lies in regions";
}

INSTANTIATE_TEST_SUITE_P(, SharedMemoryKindsTest, ::testing::ValuesIn(PromptCases()),
                         [](const auto& instance) { return instance.param.name; });

TEST_F(SharedMemoryTest, OfSkeletonRows) {
  v1::Open open = SmallOpen(300);
  open.mutable_geometry()->set_layer_count(6);
  v1::Pivot* pivot = open.mutable_method()->mutable_structkv()->mutable_pivot();
  pivot->set_mode(v1::PIVOT_MODE_FIXED);
  pivot->set_fixed_layer(2);
  const auto send = [this](PromptData data, Placed* placed) {
    Call call(channel());
    const auto message = [placed](const v1::CompressRequest& request) {
      return placed == nullptr ? request : placed->ranged->Put(request);
    };
    call.Send(OpenMessage(placed == nullptr ? data.open() : placed->ranged->Open(data.open())));
    for (uint32_t layer = 0; layer < 3; ++layer) call.Send(message(LayerMessage(data, layer)));
    EXPECT_TRUE(call.WaitForLayer(2));
    for (uint32_t layer = 3; layer < 6; ++layer) {
      data.KeepRows(layer, call.Skeleton());
      call.Send(message(LayerMessage(data, layer)));
    }
    call.Send(CommitMessage(data));
    call.HalfClose();
    const Outcome outcome = call.Finish();
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    return Assemble(placed == nullptr ? outcome : placed->ranged->Get(outcome));
  };
  const PromptData data(open, 5);
  Placed placed = Place(data);
  ExpectSame(send(data, &placed), ResultBytes(send(data, nullptr)));
}

// The rows that a pull names lie in the region, and their copies in the results' place.
TEST_F(SharedMemoryTest, OfPulledRows) {
  for (const v1::Pull pull : {v1::PULL_VALUES, v1::PULL_KEYS_AND_VALUES}) {
    for (const bool results : {true, false}) {
      SCOPED_TRACE(results);
      v1::Open open = SmallOpen();
      open.set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
      const PromptData data(open, 9);
      const Outcome inline_pull = RunWithPull(channel(), data, pull, 2);
      ASSERT_TRUE(inline_pull.status.ok()) << inline_pull.status.error_message();

      Placed placed = Place(data, results);
      Call call(channel());
      PullWorker worker(&call, &data, pull);
      call.Send(OpenMessage(placed.ranged->Open(worker.OpenMessage(2).open())));
      for (uint32_t layer = 0; layer < data.layers(); ++layer) {
        call.Send(placed.ranged->Put(worker.LayerMessage(layer)));
        const auto positions = call.WaitForPull(layer);
        ASSERT_TRUE(positions.has_value());
        call.Send(placed.ranged->Put(worker.RowsMessage(layer, *positions)));
      }
      const Answer expected = Assemble(inline_pull);
      call.Send(CommitMessage(data.layers(), expected.summary->input_bytes()));
      call.HalfClose();
      const Outcome outcome = call.Finish();
      EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
      EXPECT_TRUE(!results || InlineBytes(outcome) == 0);
      ExpectSame(Assemble(placed.ranged->Get(outcome)), ResultBytes(expected));
    }
  }
}

// Each rank has a region of its own; one of them sends inline.
TEST_F(SharedMemoryTest, OfTensorParallelRanks) {
  v1::Open open = SmallOpen(210);
  open.mutable_geometry()->set_query_head_count(8);
  open.mutable_geometry()->set_kv_head_count(2);  // two ranks share a KV head
  const PromptData whole(open, 3);
  const Answer answer = Assemble(Run(AllMessages(whole)));
  const std::vector<PromptData> parts = SplitByRanks(whole, 4);
  std::vector<Placed> placed;
  for (const PromptData& part : parts) placed.push_back(Place(part));
  std::vector<Outcome> outcomes(parts.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < parts.size(); ++i) {
    threads.emplace_back([&, i] {
      outcomes[i] = testkit::Run(NewChannel(target()),
                                 i == 3 ? AllMessages(parts[i]) : Messages(parts[i], &placed[i]));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < parts.size(); ++i) {
    SCOPED_TRACE(i);
    ASSERT_TRUE(outcomes[i].status.ok()) << outcomes[i].status.error_message();
    const Answer part = Assemble(placed[i].ranged->Get(outcomes[i]));
    EXPECT_THAT(part.faults, IsEmpty());
    EXPECT_EQ(part.summary->transport(), i == 3 ? "inline" : "shared_memory");
    EXPECT_TRUE(ResultBytesOfLayers(part) ==
                ResultBytesOfLayers(SliceAnswer(open, answer, parts[i].open().shard_group())));
  }
}

TEST_F(SharedMemoryTest, OfABatch) {
  std::vector<PromptData> prompts;
  std::vector<Placed> placed;
  std::vector<std::vector<v1::CompressRequest>> messages;
  for (uint32_t i = 0; i < 3; ++i) {
    prompts.emplace_back(SmallOpen(100 + 50 * i), i);
    placed.push_back(Place(prompts.back(), /*results=*/i != 1));
    messages.push_back(Messages(prompts.back(), &placed.back()));
    messages.back()[0].mutable_open()->set_batch_prompt_count(3);
    for (v1::CompressRequest& message : messages.back()) message.set_prompt(i);
  }
  std::vector<v1::CompressRequest> all;
  for (size_t step = 0; step < messages[0].size(); ++step) {
    for (const auto& each : messages) all.push_back(each[step]);
  }
  const Outcome outcome = Run(all);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  for (uint32_t i = 0; i < 3; ++i) {
    SCOPED_TRACE(i);
    Outcome own;
    for (const v1::CompressResponse& response : outcome.responses) {
      if (response.prompt() == i) own.responses.push_back(response);
    }
    ExpectSame(Assemble(placed[i].ranged->Get(own)),
               ResultBytes(Assemble(Run(AllMessages(prompts[i])))));
  }
}

// A layer's ranges are the caller's again once its answer is complete.
TEST_F(SharedMemoryTest, RangesAreUsedAgainFromLayerToLayer) {
  const PromptData data(SmallOpen(), 8);
  Placed placed = Place(data);
  uint64_t at = 0;
  const auto bytes = [&](v1::Tensor tensor) { return data.tensor(0, tensor).size(); };
  Call call(channel());
  call.Send(OpenMessage(placed.ranged->Open(data.open())));
  for (uint32_t layer = 0; layer < data.layers(); ++layer) {
    at = 0;
    v1::CompressRequest message;
    for (const v1::Tensor tensor : data.effective().tensors) {
      const std::string& content = data.tensor(layer, tensor);
      std::copy(content.begin(), content.end(), placed.file->data() + at);
      v1::TensorPiece* piece = message.mutable_pieces()->add_pieces();
      piece->set_layer(layer);
      piece->set_tensor(tensor);
      piece->mutable_range()->set_offset_bytes(at);
      piece->mutable_range()->set_size_bytes(content.size());
      at += (bytes(tensor) + 63) / 64 * 64;
    }
    call.Send(message);
    ASSERT_TRUE(call.WaitForLayer(layer));
    std::fill_n(placed.file->data(), at, '\xff');  // NaN
  }
  call.Send(CommitMessage(data));
  call.HalfClose();
  ExpectSame(Assemble(placed.ranged->Get(call.Finish())),
             ResultBytes(Assemble(Run(AllMessages(data)))));
}

// What the caller may do to memory that is being read changes results, and nothing else.
TEST_F(SharedMemoryTest, MemoryThatChangesGivesWrongResultsAtMost) {
  v1::Open open = SmallOpen(3000);
  const PromptData data(open, 8);
  Placed placed = Place(data);
  const std::vector<v1::CompressRequest> messages = Messages(data, &placed);
  const uint64_t inputs = placed.file->size() - placed.ranged->results().size_bytes() - 64;
  std::atomic<bool> stop{false};
  std::thread scribbler([&] {
    Random random(4);
    while (!stop.load()) {
      const auto at = static_cast<uint64_t>(random.Between(0, static_cast<int64_t>(inputs - 8)));
      const uint64_t value = random.Next();
      std::memcpy(placed.file->data() + at, &value, sizeof(value));
    }
  });
  for (int i = 0; i < 20; ++i) {
    const Outcome outcome = Run(messages);
    EXPECT_TRUE(outcome.status.ok() ||
                outcome.status.error_code() == grpc::StatusCode::INVALID_ARGUMENT)
        << outcome.status.error_message();
  }
  stop.store(true);
  scribbler.join();
}

TEST_F(SharedMemoryTest, WishesAreGrantedInOrder) {
  const PromptData data(SmallOpen(), 8);
  Placed placed = Place(data);
  std::vector<v1::CompressRequest> messages = Messages(data, &placed);
  v1::Open* open = messages[0].mutable_open();
  open->clear_transports();
  for (const v1::Transport wish :
       {v1::TRANSPORT_NCCL, v1::TRANSPORT_SHARED_MEMORY, v1::TRANSPORT_INLINE}) {
    open->add_transports(wish);
  }
  const Answer answer = Assemble(placed.ranged->Get(Run(messages)));
  ASSERT_TRUE(answer.opened.has_value());
  EXPECT_EQ(answer.opened->transport(), v1::TRANSPORT_SHARED_MEMORY);
  EXPECT_EQ(answer.opened->transport_reason(), "nccl: this server does not have it");
  EXPECT_TRUE(answer.summary.has_value());
}

class NoSharedMemoryTest : public ServiceTest {};

TEST_F(NoSharedMemoryTest, TheReasonIsGiven) {
  Start();
  const PromptData data(SmallOpen(), 8);
  std::vector<v1::CompressRequest> messages = AllMessages(data);
  messages[0].mutable_open()->add_transports(v1::TRANSPORT_SHARED_MEMORY);
  messages[0].mutable_open()->add_regions(std::string(16, 'x'));
  ExpectFailure(Run(messages), grpc::StatusCode::FAILED_PRECONDITION,
                {"open.transports", "shared_memory: this server does not have it"});
  messages[0].mutable_open()->add_transports(v1::TRANSPORT_INLINE);
  const Outcome outcome = Run(messages);
  ExpectSuccess(data, outcome);
  const Answer answer = Assemble(outcome);
  EXPECT_EQ(answer.opened->transport(), v1::TRANSPORT_INLINE);
  EXPECT_THAT(answer.opened->transport_reason(), HasSubstr("shared_memory"));
}

}  // namespace
}  // namespace structkv::testkit
