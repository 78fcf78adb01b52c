// Held caches and everything that goes wrong with them: who may not have one, leases, readers that
// go away, and sessions that must leave nothing. Neighbours run meanwhile and are undisturbed.
#include <chrono>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/held_test.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/process.h"

namespace structkv::testkit {
namespace {

using std::chrono::milliseconds;
using ::testing::AllOf;
using ::testing::HasSubstr;

const Metadata kAlice = {{"structkv-tenant", "alice"}};
const Metadata kBob = {{"structkv-tenant", "bob"}};

class HeldFailureTest : public HeldTest {
 protected:
  size_t buffer_bytes() { return server().sessions().buffers().in_use_bytes(); }
  // Those of the neighbour, once its last piece has come.
  size_t NeighbourBuffers() {
    EXPECT_TRUE(Eventually([&] { return buffer_bytes() > 0; }));
    return buffer_bytes();
  }
  void ExpectOpenRefused(const v1::Open& open, grpc::StatusCode code,
                         const std::vector<std::string>& texts) {
    ExpectFailure(Run({OpenMessage(open)}), code, texts);
    EXPECT_EQ(held_bytes(), 0);
  }
  // Long enough for a reader that stays away to hold its stream up.
  static v1::Open LongOpen() {
    v1::Open open = WideOpen(8000);
    open.mutable_method()->mutable_full();
    return open;
  }
};

TEST_F(HeldFailureTest, AServerThatHoldsNothingSaysSo) {
  Start();
  ExpectOpenRefused(Held(WideOpen()), grpc::StatusCode::UNIMPLEMENTED,
                    {"holds no caches", "--hold-budget is 0"});
  ExpectFetchFailure(Fetch(channel(), FetchRequest(std::string(16, 'x'))),
                     grpc::StatusCode::UNIMPLEMENTED, {"--hold-budget is 0"});
  EXPECT_EQ(Release(channel(), std::string(16, 'x')).error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(HeldFailureTest, BadOpensNameTheField) {
  Start(HoldOptions());
  v1::Open open = WideOpen();
  open.mutable_hold();
  ExpectOpenRefused(open, grpc::StatusCode::INVALID_ARGUMENT, {"open.hold", "OUTPUT_HOLD"});
  open.set_output(v1::OUTPUT_HOLD);
  open.mutable_hold()->set_lease_millis(0);
  ExpectOpenRefused(open, grpc::StatusCode::INVALID_ARGUMENT,
                    {"open.hold.lease_millis is 0", "1 to 600000"});
  open.mutable_hold()->set_lease_millis(600001);
  ExpectOpenRefused(open, grpc::StatusCode::INVALID_ARGUMENT,
                    {"open.hold.lease_millis is 600001", "1 to 600000"});
  open.clear_hold();
  open.mutable_shard_group()->set_shard_count(1);
  open.mutable_shard_group()->set_decode_shard_count(2);
  ExpectOpenRefused(open, grpc::StatusCode::INVALID_ARGUMENT,
                    {"open.shard_group.decode_shard_count is 2", "OUTPUT_HOLD"});
  open = Held(WideOpen());
  open.mutable_method()->mutable_gemfilter()->set_filter_layer(1);
  ExpectOpenRefused(open, grpc::StatusCode::INVALID_ARGUMENT,
                    {"open.output is OUTPUT_HOLD", "gemfilter", "OUTPUT_PLAN"});
  open = Held(WideOpen());
  ExpectFailure(
      Run({OpenMessage(open)}, {.metadata = {{"structkv-tenant", std::string(129, 'x')}}}),
      grpc::StatusCode::INVALID_ARGUMENT, {"structkv-tenant is 129 bytes", "128"});
}

TEST_F(HeldFailureTest, BadRequestsNameTheField) {
  Start(HoldOptions());
  const std::string handle = Hold(PromptData(WideOpen(), 1)).summary->held().handle();
  const uint64_t total = Fetch(channel(), FetchRequest(handle)).bytes.size();
  const auto refused = [&](const std::function<void(v1::FetchCacheRequest*)>& set,
                           const std::vector<std::string>& texts) {
    v1::FetchCacheRequest request = FetchRequest(handle);
    set(&request);
    ExpectFetchFailure(Fetch(channel(), request), grpc::StatusCode::INVALID_ARGUMENT, texts);
  };
  refused([](auto* request) { request->set_handle("short"); }, {"handle is 5 bytes long", "16"});
  refused([](auto* request) { request->set_first_layer(4); },
          {"first_layer is 4", "layers 0 to 3 are held"});
  refused(
      [](auto* request) {
        request->set_first_layer(2);
        request->set_layer_count(3);
      },
      {"first_layer is 2", "layer_count 3", "layers 0 to 3"});
  refused([](auto* request) { request->set_layer_count(~0U); }, {"layer_count 4294967295"});
  refused([](auto* request) { request->set_first_kv_head(4); },
          {"first_kv_head is 4", "KV heads 0 to 3 are held"});
  refused(
      [](auto* request) {
        request->set_first_kv_head(~0U);
        request->set_kv_head_count(~0U);
      },
      {"first_kv_head is 4294967295", "kv_head_count 4294967295"});
  refused([&](auto* request) { request->set_skip_bytes(total + 1); },
          {"skip_bytes is " + std::to_string(total + 1), "0 to " + std::to_string(total)});
  refused([](auto* request) { request->set_max_response_message_bytes(65535); },
          {"max_response_message_bytes is 65535", "65536 to 4194304"});
  refused([](auto* request) { request->set_max_response_message_bytes(5 << 20); },
          {"max_response_message_bytes is 5242880"});
  const grpc::Status renewed = Renew(channel(), handle, {}, 600001);
  EXPECT_EQ(renewed.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(renewed.error_message(), HasSubstr("lease_millis is 600001; 1 to 600000"));
  EXPECT_EQ(Renew(channel(), "x").error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Release(channel(), "x").error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(Release(channel(), handle).ok());
}

TEST_F(HeldFailureTest, AHandleIsItsTenantsAlone) {
  Start(HoldOptions());
  const std::string handle = Hold(PromptData(WideOpen(), 1), kAlice).summary->held().handle();
  const Fetched unknown = Fetch(channel(), FetchRequest(std::string(16, '\0')), kAlice);
  ExpectFetchFailure(unknown, grpc::StatusCode::NOT_FOUND, {"no such cache is held"});
  for (const Metadata& other : {kBob, Metadata(), Metadata{{"structkv-tenant", ""}}}) {
    const Fetched fetched = Fetch(channel(), FetchRequest(handle), other);
    EXPECT_EQ(fetched.status.error_code(), grpc::StatusCode::NOT_FOUND);
    EXPECT_EQ(fetched.status.error_message(), unknown.status.error_message());
    EXPECT_FALSE(fetched.info.has_value());
    EXPECT_EQ(Renew(channel(), handle, other).error_code(), grpc::StatusCode::NOT_FOUND);
    EXPECT_EQ(Release(channel(), handle, other).error_code(), grpc::StatusCode::NOT_FOUND);
  }
  EXPECT_TRUE(Fetch(channel(), FetchRequest(handle), kAlice).status.ok());
  EXPECT_TRUE(Release(channel(), handle, kAlice).ok());
  EXPECT_EQ(Release(channel(), handle, kAlice).error_message(), unknown.status.error_message());
}

TEST_F(HeldFailureTest, LeasesRunOutUnlessTheyAreRenewed) {
  const auto clock = std::make_shared<FakeClock>();
  ServerOptions options = HoldOptions();
  options.sessions.clock = clock;
  Start(options);
  v1::Open open = WideOpen();
  open.mutable_hold()->set_lease_millis(5000);
  const Answer held = Hold(PromptData(open, 1));
  EXPECT_EQ(held.summary->held().lease_millis(), 5000U);
  const std::string handle = held.summary->held().handle();
  for (int i = 0; i < 3; ++i) {
    clock->Advance(milliseconds(4999));
    uint64_t lease = 0;
    EXPECT_TRUE(Renew(channel(), handle, {}, std::nullopt, &lease).ok());
    EXPECT_EQ(lease, 5000U);
  }
  uint64_t lease = 0;
  EXPECT_TRUE(Renew(channel(), handle, {}, 9000, &lease).ok());
  EXPECT_EQ(lease, 9000U);
  clock->Advance(milliseconds(8999));
  EXPECT_TRUE(Fetch(channel(), FetchRequest(handle)).status.ok());
  EXPECT_GT(held_bytes(), 0);
  clock->Advance(milliseconds(1));
  ExpectFetchFailure(Fetch(channel(), FetchRequest(handle)), grpc::StatusCode::NOT_FOUND, {});
  EXPECT_EQ(Renew(channel(), handle).error_code(), grpc::StatusCode::NOT_FOUND);
  // The server's tick gives the memory back without anybody's asking.
  EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
}

TEST_F(HeldFailureTest, ReleasedOrExpiredWhileItIsRead) {
  const auto clock = std::make_shared<FakeClock>();
  ServerOptions options = HoldOptions();
  options.sessions.clock = clock;
  Start(options);
  const v1::Open open = LongOpen();
  const PromptData data(open, 5);
  const Answer whole = Assemble(Run(AllMessages(data)));
  for (const bool release : {true, false}) {
    const std::string handle = Hold(data).summary->held().handle();
    const int64_t bytes = held_bytes();
    v1::FetchCacheRequest request = FetchRequest(handle);
    request.set_max_response_message_bytes(256 << 10);
    FetchCall reader(NewChannel(target()), request);
    ASSERT_TRUE(reader.ReadOne());
    if (release) {
      EXPECT_TRUE(Release(channel(), handle).ok());
    } else {
      clock->Advance(milliseconds(60000));
    }
    ExpectFetchFailure(Fetch(channel(), request), grpc::StatusCode::NOT_FOUND, {});
    EXPECT_EQ(held_bytes(), bytes) << "the reader's memory";
    ExpectSlice(open, whole, reader.Finish(), 0, 4, 0, 4);
    EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
  }
}

TEST_F(HeldFailureTest, AReaderThatGoesAwayLeavesNothing) {
  Start(HoldOptions());
  NeighbourBuffers();
  const PromptData data(LongOpen(), 5);
  const std::string handle = Hold(data).summary->held().handle();
  ExpectMemoryBack();
  const size_t buffers = buffer_bytes();
  for (const uint32_t heads : {0U, 1U}) {
    v1::FetchCacheRequest request = FetchRequest(handle);
    request.set_kv_head_count(heads);
    FetchCall reader(NewChannel(target()), request);
    ASSERT_TRUE(reader.ReadOne());
    EXPECT_TRUE(Eventually([&] { return server().active_streams() == 2; }))  // the neighbour's too
        << server().active_streams();
    reader.Cancel();
    EXPECT_EQ(reader.Finish().status.error_code(), grpc::StatusCode::CANCELLED);
    ExpectMemoryBack();
    EXPECT_TRUE(Eventually([&] { return buffer_bytes() == buffers; }));
  }
  EXPECT_TRUE(Release(channel(), handle).ok());
  EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
}

TEST_F(HeldFailureTest, AReaderThatStaysAwayIsCutOff) {
  ServerOptions options = HoldOptions();
  options.streams.stall = absl::Milliseconds(300);
  StartAlone(options);
  v1::Open open = LongOpen();
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  const std::string handle = Hold(PromptData(open, 5)).summary->held().handle();
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.set_kv_head_count(3);
  FetchCall reader(NewChannel(target()), request);
  ASSERT_TRUE(reader.ReadOne());
  EXPECT_GT(server().sessions().budget().reserved_bytes(), 0) << "of two messages";
  EXPECT_TRUE(Eventually([&] { return server().active_streams() == 0; }));
  ExpectFetchFailure(reader.Finish(), grpc::StatusCode::ABORTED, {"stall limit", "300ms"});
  EXPECT_EQ(server().sessions().budget().reserved_bytes(), 0);
  EXPECT_TRUE(Release(channel(), handle).ok());
}

TEST_F(HeldFailureTest, AFetchMayNotLastForever) {
  ServerOptions options = HoldOptions();
  options.streams.session = absl::Milliseconds(400);
  StartAlone(options);
  const std::string handle = Hold(PromptData(LongOpen(), 5)).summary->held().handle();
  FetchCall reader(NewChannel(target()), FetchRequest(handle));
  ASSERT_TRUE(reader.ReadOne());
  EXPECT_TRUE(Eventually([&] { return server().active_streams() == 0; }));
  ExpectFetchFailure(reader.Finish(), grpc::StatusCode::DEADLINE_EXCEEDED, {"400ms"});
  EXPECT_TRUE(Release(channel(), handle).ok());
}

TEST_F(HeldFailureTest, ABudgetThatIsTakenOrTooSmall) {
  ServerOptions options = HoldOptions();
  options.sessions.hold.budget_bytes = 300 << 10;
  Start(options);
  v1::Open open = WideOpen(100);
  open.mutable_method()->mutable_full();
  const PromptData data(open, 1);
  const std::string handle = Hold(data).summary->held().handle();
  const int64_t reserved = held_bytes();
  EXPECT_GT(reserved, 150 << 10);
  const Outcome taken = Run({OpenMessage(Held(open))});
  ExpectFailure(taken, grpc::StatusCode::RESOURCE_EXHAUSTED,
                {"--hold-budget", std::to_string(reserved), "307200"});
  EXPECT_EQ(taken.trailers.at("grpc-retry-pushback-ms"), "1000");
  v1::Open large = Held(WideOpen(2000));
  large.mutable_method()->mutable_full();
  const Outcome never = Run({OpenMessage(large)});
  ExpectFailure(never, grpc::StatusCode::RESOURCE_EXHAUSTED, {"--hold-budget", "whole budget"});
  EXPECT_EQ(never.trailers.at("grpc-retry-pushback-ms"), "-1");
  EXPECT_EQ(held_bytes(), reserved);
  ExpectSuccess(data, Run(AllMessages(data)));
  EXPECT_TRUE(Release(channel(), handle).ok());
  const std::string again = Hold(data).summary->held().handle();
  EXPECT_TRUE(Release(channel(), again).ok());
}

// Of a few heads of a short cache that is not much.
TEST_F(HeldFailureTest, AFetchOfSomeHeadsNeedsRoomForItsCopies) {
  StartAlone(HoldOptions());
  v1::Open open = WideOpen();
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  open.mutable_method()->mutable_full();
  const std::string handle = Hold(PromptData(open, 1)).summary->held().handle();
  session::SessionManager& sessions = server().sessions();
  EXPECT_TRUE(Eventually([&] { return sessions.budget().reserved_bytes() == 0; }));
  constexpr int64_t kCopies = 2 * (2 * 200 * 32 * 2 + 2 * 4096);  // keys and values of a head
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.set_kv_head_count(1);
  {
    const auto taken = sessions.Reserve("", sessions.budget().limit_bytes() - kCopies + 1);
    ASSERT_TRUE(taken.ok()) << taken.status();
    const Fetched refused = Fetch(channel(), request);
    ExpectFetchFailure(refused, grpc::StatusCode::RESOURCE_EXHAUSTED, {std::to_string(kCopies)});
    EXPECT_EQ(refused.trailers.at("grpc-retry-pushback-ms"), "1000");
    EXPECT_TRUE(Fetch(channel(), FetchRequest(handle)).status.ok()) << "all heads lie together";
  }
  const auto taken = sessions.Reserve("", sessions.budget().limit_bytes() - kCopies);
  ASSERT_TRUE(taken.ok()) << taken.status();
  EXPECT_TRUE(Fetch(channel(), request).status.ok());
  EXPECT_TRUE(Release(channel(), handle).ok());
}

// Buffers come in sizes; what is held is what was reserved, to the page.
TEST_F(HeldFailureTest, HoldsNoMoreThanItReserved) {
  StartAlone(HoldOptions());
  v1::Open open = WideOpen(4000);
  open.mutable_method()->mutable_full();
  std::vector<std::string> handles;
  for (uint32_t tokens : {4000U, 3900U, 3800U}) {  // into buffers of the one before
    open.set_prompt_tokens(tokens);
    handles.push_back(Hold(PromptData(open, 1)).summary->held().handle());
    EXPECT_TRUE(Eventually([&] { return server().active_streams() == 0; }));
    EXPECT_LE(buffer_bytes(), static_cast<size_t>(held_bytes())) << tokens;
    EXPECT_TRUE(Release(channel(), handles.back()).ok());
  }
}

TEST_F(HeldFailureTest, SessionsThatFailLeaveNothing) {
  Start(HoldOptions());
  const size_t buffers = NeighbourBuffers();
  const PromptData data(Held(WideOpen()), 1);
  const auto expect_nothing = [&] {
    ExpectMemoryBack();
    EXPECT_TRUE(Eventually([&] { return held_bytes() == 0 && buffer_bytes() == buffers; }))
        << held_bytes() << " held, buffers " << buffer_bytes();
    EXPECT_EQ(server().sessions().held_caches().count(), 0);
  };
  {
    SCOPED_TRACE("cancelled with all layers answered");
    Call call(channel());
    call.Send(OpenMessage(data.open()));
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      call.Send(LayerMessage(data, layer));
      EXPECT_TRUE(call.WaitForLayer(layer));
    }
    EXPECT_GT(buffer_bytes(), buffers) << "rows are held already";
    call.Cancel();
    ExpectFailure(call.Finish(), grpc::StatusCode::CANCELLED, {});
    expect_nothing();
  }
  {
    SCOPED_TRACE("a commit that disagrees");
    std::vector<v1::CompressRequest> messages = AllMessages(data);
    messages.back() = CommitMessage(data.layers(), data.total_bytes() + 1);
    ExpectFailure(Run(messages), grpc::StatusCode::INVALID_ARGUMENT, {});
    expect_nothing();
  }
  {
    SCOPED_TRACE("no commit");
    std::vector<v1::CompressRequest> messages = AllMessages(data);
    messages.pop_back();
    ExpectFailure(Run(messages), grpc::StatusCode::INVALID_ARGUMENT, {"before `commit`"});
    expect_nothing();
  }
  {
    SCOPED_TRACE("a bad layer after a good one");
    PromptData bad = data;
    std::string* saliency = bad.mutable_tensor(2, v1::TENSOR_WINDOW_QUERIES);
    SetElement(v1::DTYPE_BF16, std::numeric_limits<float>::quiet_NaN(), 3, saliency);
    ExpectFailure(Run(AllMessages(bad)), grpc::StatusCode::INVALID_ARGUMENT, {"layer 2"});
    expect_nothing();
  }
  {
    SCOPED_TRACE("replaced by its own retry");
    v1::Open open = data.open();
    open.set_idempotency_key("one");
    Call old(channel());
    old.Send(OpenMessage(open));
    ASSERT_TRUE(old.WaitForOpened().has_value());
    old.Send(LayerMessage(data, 0));
    EXPECT_TRUE(old.WaitForLayer(0));
    std::vector<v1::CompressRequest> messages = AllMessages(data);
    *messages[0].mutable_open() = open;
    const Answer answer = Assemble(Run(messages));
    ExpectFailure(old.Finish(), grpc::StatusCode::ABORTED, {});
    ASSERT_TRUE(answer.summary.has_value());
    EXPECT_EQ(server().sessions().held_caches().count(), 1);
    EXPECT_TRUE(Release(channel(), answer.summary->held().handle()).ok());
    expect_nothing();
  }
}

// A caller that goes away before it was told of the handle: nobody could ever release it.
TEST_F(HeldFailureTest, WhatNobodyWasToldOfIsDropped) {
  Start(HoldOptions());
  const PromptData data(Held(WideOpen()), 1);
  Call call(channel());
  for (const v1::CompressRequest& message : AllMessages(data)) call.Send(message);
  // The summary waits for the half-close.
  EXPECT_TRUE(Eventually([&] { return server().sessions().held_caches().count() == 1; }));
  call.Cancel();
  ExpectFailure(call.Finish(), grpc::StatusCode::CANCELLED, {});
  EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
}

// In a batch a summary counts once it has left; a caller that was not told has nothing to release.
TEST_F(HeldFailureTest, OfABatchThatBreaksWhatWasToldStays) {
  Start(HoldOptions());
  v1::Open open = Held(WideOpen());
  open.set_batch_prompt_count(2);
  const PromptData data(open, 4);
  const auto of_prompt = [](v1::CompressRequest message, uint32_t prompt) {
    message.set_prompt(prompt);
    return message;
  };
  std::string told;
  {
    Call call(channel());
    for (const v1::CompressRequest& message : AllMessages(data)) call.Send(of_prompt(message, 0));
    ASSERT_TRUE(call.WaitForResponses(7));  // opened, layers, the pivot, its summary
    EXPECT_EQ(server().sessions().held_caches().count(), 1);
    std::vector<v1::CompressRequest> messages = AllMessages(data);
    for (const v1::CompressRequest& message : messages) call.Send(of_prompt(message, 1));
    // The last summary waits for the half-close.
    EXPECT_TRUE(Eventually([&] { return server().sessions().held_caches().count() == 2; }));
    call.Cancel();
    const Outcome outcome = call.Finish();
    for (const v1::CompressResponse& response : outcome.responses) {
      if (response.has_summary()) told = response.summary().held().handle();
    }
  }
  EXPECT_TRUE(Eventually([&] { return server().sessions().held_caches().count() == 1; }));
  EXPECT_TRUE(Fetch(channel(), FetchRequest(told)).status.ok());
  EXPECT_TRUE(Release(channel(), told).ok());
  EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
}

TEST_F(HeldFailureTest, TheDefaultLeaseLiesWithinTheLongest) {
  ServerOptions options = HoldOptions();
  options.sessions.hold.default_lease = absl::Seconds(20);
  options.sessions.hold.max_lease = absl::Seconds(10);
  const absl::Status status = Server::Start(options).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("hold-lease is 20s"), HasSubstr("max-hold-lease (10s)")));
}

// Waits until it has given away what it holds; new prompts are refused meanwhile.
TEST_F(HeldFailureTest, ADrainingServerHandsOutWhatItHolds) {
  StartAlone(HoldOptions());
  const PromptData data(WideOpen(), 1);
  const std::string handle = Hold(data).summary->held().handle();
  const std::string expected = Fetch(channel(), FetchRequest(handle)).bytes;
  std::optional<bool> finished;
  std::vector<int64_t> told;
  std::thread drain([&] {
    finished = server().Drain(absl::Seconds(60),
                              [&](const DrainProgress& left) { told.push_back(left.held_caches); });
  });
  EXPECT_TRUE(Eventually([&] { return server().sessions().draining(); }));
  ExpectFailure(testkit::Run(NewChannel(target()), AllMessages(data)),
                grpc::StatusCode::UNAVAILABLE, {"draining"});
  for (int i = 0; i < 2; ++i) {  // of two ranks, say
    const Fetched fetched = Fetch(NewChannel(target()), FetchRequest(handle));
    EXPECT_TRUE(fetched.status.ok()) << fetched.status.error_message();
    EXPECT_TRUE(fetched.bytes == expected);
  }
  EXPECT_TRUE(Renew(channel(), handle).ok());
  EXPECT_EQ(server().drain_progress()->held_caches, 1);
  EXPECT_TRUE(Release(channel(), handle).ok());
  drain.join();
  EXPECT_EQ(finished, true);
  ASSERT_FALSE(told.empty());
  EXPECT_EQ(told.front(), 1);
}

TEST_F(HeldFailureTest, ADrainWaitsForLeasesToEnd) {
  ServerOptions options = HoldOptions();
  options.sessions.hold.default_lease = absl::Milliseconds(700);
  StartAlone(options);
  Hold(PromptData(WideOpen(), 1));
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(server().Drain(absl::Seconds(60)));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(30));
  EXPECT_EQ(server().sessions().held_caches().expired(), 1);
}

// Nobody comes for it: the limit is the drain's, and no stream is cut.
TEST_F(HeldFailureTest, ADrainLosesWhatNobodyFetches) {
  StartAlone(HoldOptions());
  const std::string handle = Hold(PromptData(WideOpen(), 1)).summary->held().handle();
  EXPECT_TRUE(server().Drain(absl::Milliseconds(300)));
  EXPECT_EQ(server().sessions().held_caches().count(), 1);
  EXPECT_EQ(Fetch(NewChannel(target()), FetchRequest(handle)).status.error_code(),
            grpc::StatusCode::UNAVAILABLE);
  StopUnderPrompts();  // it still holds the cache
}

TEST_F(HeldFailureTest, ALostBackendHandsOutNoMore) {
  StartAlone(HoldOptions());
  const std::string handle = Hold(PromptData(WideOpen(), 1)).summary->held().handle();
  // A prompt whose stream is cut, though its last message has left, leaves no cache.
  ASSERT_TRUE(Eventually([&] { return server().active_streams() == 0; }));
  server().FailAll(absl::UnavailableError("the backend is lost"), absl::Seconds(1));
  ExpectFetchFailure(Fetch(channel(), FetchRequest(handle)), grpc::StatusCode::UNAVAILABLE,
                     {"the backend is lost"});
  EXPECT_TRUE(Release(channel(), handle).ok());
}

}  // namespace
}  // namespace structkv::testkit
