// Chunked prefill: keys and values come chunk by chunk, all layers of a chunk before the next one,
// and the window's queries at the end. The answer is that of whole layers, to the byte.
#include <algorithm>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

v1::Open ChunkedOpen(v1::Layout layout) {
  v1::Open open = SmallOpen(500);
  open.mutable_geometry()->set_layer_count(5);
  open.mutable_geometry()->set_value_dim(64);
  open.set_layout(layout);
  open.set_return_saliency(true);
  open.set_return_centrality(true);
  open.set_layers_in_flight(5);
  return open;
}

// Every message of a prompt that is prefilled `chunk` tokens at a time.
std::vector<v1::CompressRequest> ChunkedMessages(const PromptData& data, uint32_t chunk) {
  std::vector<v1::CompressRequest> messages = {OpenMessage(data.open())};
  const uint32_t tokens = data.open().prompt_tokens();
  for (uint32_t first = 0; first < tokens; first += chunk) {
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      v1::CompressRequest& message = messages.emplace_back();
      for (auto& piece : ChunkPieces(data, layer, first, std::min(chunk, tokens - first))) {
        *message.mutable_pieces()->add_pieces() = std::move(piece);
      }
    }
  }
  for (uint32_t layer = 0; layer < data.layers(); ++layer) {
    messages.push_back(PieceMessage(MakePiece(data, layer, v1::TENSOR_WINDOW_QUERIES)));
  }
  messages.push_back(CommitMessage(data));
  return messages;
}

class ChunkedTest : public ServiceTest,
                    public ::testing::WithParamInterface<std::tuple<v1::Layout, v1::Granularity>> {
};

TEST_P(ChunkedTest, IsAnsweredAsWholeLayersAre) {
  Start();
  const auto& [layout, granularity] = GetParam();
  v1::Open open = ChunkedOpen(layout);
  open.mutable_method()->mutable_structkv()->set_granularity(granularity);
  const PromptData data(open, 31);
  const Outcome whole = Run(AllMessages(data));
  ExpectSuccess(data, whole);
  const std::string expected = ResultBytes(Assemble(whole));
  for (const uint32_t chunk : {1U, 7U, 64U, 250U, 499U, 500U}) {
    SCOPED_TRACE(chunk);
    const Outcome outcome = Run(ChunkedMessages(data, chunk));
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    const Answer answer = Assemble(outcome);
    EXPECT_THAT(answer.faults, ::testing::IsEmpty());
    EXPECT_TRUE(ResultBytes(answer) == expected);
  }
}

INSTANTIATE_TEST_SUITE_P(
    , ChunkedTest,
    ::testing::Combine(::testing::Values(v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM),
                       ::testing::Values(v1::GRANULARITY_PER_LAYER, v1::GRANULARITY_PER_KV_HEAD)));

class ChunkedMemoryTest : public ServiceTest {};

// What docs/protocol.md says of the memory: a further layer in flight costs that layer's tensors.
TEST_F(ChunkedMemoryTest, OpenedStatesTheReservation) {
  Start();
  v1::Open open = ChunkedOpen(v1::LAYOUT_HEAD_TOKEN_DIM);
  const PromptData data(open, 31);
  const auto reserved = [&](uint32_t layers_in_flight) {
    open.set_layers_in_flight(layers_in_flight);
    Call call(channel());
    call.Send(OpenMessage(open));
    const uint64_t bytes = call.WaitForOpened().value_or(v1::Opened()).reserved_bytes();
    EXPECT_EQ(server().sessions().budget().reserved_bytes() - neighbour_bytes(),
              static_cast<int64_t>(bytes));
    call.Cancel();
    call.Finish();
    ExpectMemoryBack();
    return bytes;
  };
  const uint64_t two = reserved(2);
  EXPECT_EQ(reserved(5) - two, data.total_bytes() / 5 * 3);
}

// Without room for all layers the second layer's chunk is too early, as any piece is.
TEST_F(ChunkedMemoryTest, NeedsAllLayersInFlight) {
  Start();
  v1::Open open = ChunkedOpen(v1::LAYOUT_TOKEN_HEAD_DIM);
  open.set_layers_in_flight(1);
  const PromptData data(open, 31);
  ExpectFailure(Run(ChunkedMessages(data, 100)), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 1, keys", "too early", "layers_in_flight is 1"});
}

// A bound on the record of pieces; with [kv_head, token, dim] a chunk has a piece for each head.
TEST_F(ChunkedMemoryTest, ChunksMayNotBeTooSmall) {
  Start();
  v1::Open open = ChunkedOpen(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.set_prompt_tokens(600);
  const PromptData data(open, 31);
  ExpectFailure(Run(ChunkedMessages(data, 1)), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 0, keys", "one too many", "1028 pieces"});
}

}  // namespace
}  // namespace structkv::testkit
