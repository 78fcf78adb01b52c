// CompressSession::SendChunk: token ranges land where whole tensors would have put them.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/sizes.h"
#include "tests/client/fake_server.h"

namespace structkv::client {
namespace {

using ::testing::HasSubstr;

v1::Open ChunkOpen(v1::Layout layout) {
  v1::Open open = SmallOpen();
  open.mutable_geometry()->set_kv_head_count(2);
  open.mutable_geometry()->set_value_dim(3);
  open.set_prompt_tokens(10);
  open.set_layout(layout);
  return open;
}

// Tokens [first, first + tokens) of a whole tensor.
std::string Chunk(const v1::Open& open, const std::string& whole, uint32_t first, uint32_t tokens) {
  const size_t heads = open.geometry().kv_head_count();
  const bool head_first = open.layout() == v1::LAYOUT_HEAD_TOKEN_DIM;
  const size_t runs = head_first ? heads : 1;
  const size_t run = whole.size() / runs;
  const size_t row = run / open.prompt_tokens();
  std::string chunk;
  for (size_t i = 0; i < runs; ++i) chunk += whole.substr(i * run + first * row, tokens * row);
  return chunk;
}

class ChunkTest : public ::testing::Test {
 protected:
  ChunkTest()
      : server_([this](int, grpc::ServerContext*, Stream* stream) {
          return Behave(stream, &received_);
        }),
        client_(*Client::Connect(server_.address())) {}

  Received received_;
  FakeServer server_;
  std::unique_ptr<Client> client_;
};

class ChunkLayoutTest : public ChunkTest, public ::testing::WithParamInterface<v1::Layout> {};

TEST_P(ChunkLayoutTest, ChunksMakeUpTheTensors) {
  const v1::Open open = ChunkOpen(GetParam());
  auto session = client_->OpenPrompt(open);
  ASSERT_TRUE(session.ok()) << session.status();
  const auto tensor = [&](uint32_t layer, v1::Tensor which) {
    return TestTensor(layer, which, InputTensorBytes(open, (*session)->opened(), which));
  };
  for (const uint32_t first : {0U, 4U, 8U}) {
    const uint32_t tokens = std::min(4U, 10U - first);
    for (uint32_t layer = 0; layer < 2; ++layer) {
      const std::string keys = Chunk(open, tensor(layer, v1::TENSOR_KEYS), first, tokens);
      const std::string values = Chunk(open, tensor(layer, v1::TENSOR_VALUES), first, tokens);
      const absl::Status sent =
          (*session)->SendChunk(layer, first, tokens, {AsBytes(keys), AsBytes(values), nullptr});
      ASSERT_TRUE(sent.ok()) << sent;
    }
  }
  for (uint32_t layer = 0; layer < 2; ++layer) {
    const std::string queries = tensor(layer, v1::TENSOR_WINDOW_QUERIES);
    ASSERT_TRUE((*session)->Send(layer, v1::TENSOR_WINDOW_QUERIES, AsBytes(queries)).ok());
  }
  ASSERT_TRUE((*session)->Commit().ok());
  const auto summary = (*session)->Wait();
  ASSERT_TRUE(summary.ok()) << summary.status();
  uint64_t total = 0;
  for (uint32_t layer = 0; layer < 2; ++layer) {
    for (const v1::Tensor which : {v1::TENSOR_KEYS, v1::TENSOR_VALUES, v1::TENSOR_WINDOW_QUERIES}) {
      EXPECT_EQ((received_.tensors[{layer, which}]), tensor(layer, which))
          << "layer " << layer << " tensor " << which;
      total += tensor(layer, which).size();
    }
  }
  EXPECT_EQ(received_.commit.input_bytes(), total);
}

INSTANTIATE_TEST_SUITE_P(, ChunkLayoutTest,
                         ::testing::Values(v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM));

TEST_F(ChunkTest, RefusesWhatDoesNotFit) {
  const v1::Open open = ChunkOpen(v1::LAYOUT_HEAD_TOKEN_DIM);
  auto session = client_->OpenPrompt(open);
  ASSERT_TRUE(session.ok()) << session.status();
  const std::string keys(3 * 2 * 4 * sizeof(float), 'k');
  const std::string values(3 * 2 * 3 * sizeof(float), 'v');
  const ChunkTensors three = {AsBytes(keys), AsBytes(values), nullptr};
  for (const auto& [first, tokens] :
       {std::pair(8U, 3U), std::pair(10U, 1U), std::pair(0U, 0U), std::pair(4U, UINT32_MAX)}) {
    const absl::Status status = (*session)->SendChunk(0, first, tokens, three);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("not within the prompt's 10"));
  }
  const absl::Status status = (*session)->SendChunk(0, 0, 4, three);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("TENSOR_KEYS of 4 tokens has 96 bytes; 128 are needed"));
}

}  // namespace
}  // namespace structkv::client
