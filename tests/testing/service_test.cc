#include "tests/testing/service_test.h"

#include <utility>

#include "gmock/gmock.h"
#include "tests/testing/process.h"

namespace structkv::testkit {
namespace {

v1::Open NeighbourOpen() {
  v1::Open open = SmallOpen(300);
  open.set_return_saliency(true);
  open.set_return_centrality(true);
  return open;
}

}  // namespace

ServerOptions TestOptions() {
  ServerOptions options;
  options.listen = {"127.0.0.1:0"};
  options.sessions.memory_budget_bytes = int64_t{256} << 20;
  options.sessions.idle_buffer_bytes = int64_t{32} << 20;
  options.sessions.threads = 2;
  return options;
}

Neighbour::Neighbour(const std::shared_ptr<grpc::Channel>& channel, const PromptData* data)
    : data_(*data), call_(channel) {
  call_.Send(OpenMessage(data_.open()));
  call_.WaitForOpened();
  const uint32_t half = data_.layers() / 2;
  for (uint32_t layer = 0; layer < half; ++layer) {
    call_.Send(LayerMessage(data_, layer));
    call_.WaitForLayer(layer);
  }
  call_.Send(PieceMessage(MakePiece(data_, half, v1::TENSOR_KEYS)));
}

Outcome Neighbour::Finish() {
  const uint32_t half = data_.layers() / 2;
  for (uint32_t layer = half; layer < data_.layers(); ++layer) {
    call_.Send(LayerMessage(data_, layer));  // the keys of the first again: ignored
  }
  call_.Send(CommitMessage(data_));
  call_.HalfClose();
  return call_.Finish();
}

ServiceTest::ServiceTest() : neighbour_data_(NeighbourOpen(), 77) {}

ServiceTest::~ServiceTest() {
  ExpectUndisturbed();
  ExpectNothingHeld();
}

void ServiceTest::StartAlone(ServerOptions options, std::unique_ptr<Backend> backend) {
  absl::StatusOr<std::unique_ptr<Server>> server =
      backend == nullptr ? Server::Start(std::move(options))
                         : Server::Start(std::move(options), std::move(backend));
  ASSERT_TRUE(server.ok()) << server.status();
  server_ = *std::move(server);
  target_ = "127.0.0.1:" + std::to_string(server_->port());
  channel_ = NewChannel(target_);
}

void ServiceTest::Stop() {
  ExpectNothingHeld();
  server_.reset();
}

void ServiceTest::StopUnderPrompts() { server_.reset(); }

void ServiceTest::Restart(ServerOptions options) {
  Stop();
  StartAlone(std::move(options));
}

void ServiceTest::Start(ServerOptions options) {
  StartAlone(std::move(options));
  ASSERT_NE(server_, nullptr);
  neighbour_channel_ = NewChannel(target_);
  const Outcome outcome = testkit::Run(neighbour_channel_, AllMessages(neighbour_data_));
  ExpectSuccess(neighbour_data_, outcome);
  undisturbed_ = ResultBytes(Assemble(outcome));
  ASSERT_TRUE(Eventually([&] { return server_->sessions().budget().reserved_bytes() == 0; }));
  neighbour_ = std::make_unique<Neighbour>(neighbour_channel_, &neighbour_data_);
  neighbour_bytes_ = server_->sessions().budget().reserved_bytes();
  EXPECT_GT(neighbour_bytes_, 0);
}

void ServiceTest::ExpectMemoryBack() {
  if (server_ == nullptr) return;
  EXPECT_TRUE(Eventually([&] {
    return server_->sessions().budget().reserved_bytes() == neighbour_bytes_ &&
           server_->active_streams() == (neighbour_ != nullptr ? 1 : 0);
  })) << "reserved "
      << server_->sessions().budget().reserved_bytes() << ", the neighbour has " << neighbour_bytes_
      << "; streams " << server_->active_streams();
}

void ServiceTest::ExpectUndisturbed() {
  if (neighbour_ == nullptr) return;
  ExpectMemoryBack();
  const Outcome outcome = neighbour_->Finish();
  EXPECT_TRUE(outcome.status.ok()) << "neighbour: " << outcome.status.error_message();
  const Answer answer = Assemble(outcome);
  EXPECT_THAT(answer.faults, ::testing::IsEmpty());
  EXPECT_TRUE(ResultBytes(answer) == undisturbed_) << "the neighbour's result differs";
  neighbour_.reset();
  neighbour_bytes_ = 0;
  ExpectNothingHeld();
}

void ServiceTest::ExpectNothingHeld() {
  if (server_ == nullptr) return;
  const session::SessionManager& sessions = server_->sessions();
  EXPECT_TRUE(Eventually([&] {
    return sessions.budget().reserved_bytes() == 0 && sessions.buffers().in_use_bytes() == 0 &&
           sessions.active_sessions() == 0 && server_->active_streams() == 0 &&
           sessions.held_caches().budget().reserved_bytes() == 0;
  })) << "reserved "
      << sessions.budget().reserved_bytes() << ", buffers " << sessions.buffers().in_use_bytes()
      << ", sessions " << sessions.active_sessions() << ", streams " << server_->active_streams()
      << ", held " << sessions.held_caches().budget().reserved_bytes();
}

Outcome ServiceTest::Run(const std::vector<v1::CompressRequest>& messages,
                         const CallOptions& options) {
  return testkit::Run(channel_, messages, options);
}

void ExpectFailure(const Outcome& outcome, grpc::StatusCode code,
                   const std::vector<std::string>& texts) {
  EXPECT_EQ(outcome.status.error_code(), code) << outcome.status.error_message();
  for (const std::string& text : texts) {
    EXPECT_THAT(outcome.status.error_message(), ::testing::HasSubstr(text));
  }
  for (const v1::CompressResponse& response : outcome.responses) {
    EXPECT_FALSE(response.has_summary());
  }
}

void ExpectSuccess(const PromptData& data, const Outcome& outcome) {
  EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  const Answer answer = Assemble(outcome);
  EXPECT_THAT(answer.faults, ::testing::IsEmpty());
  EXPECT_THAT(CompareWithOracle(data, answer), ::testing::IsEmpty());
}

}  // namespace structkv::testkit
