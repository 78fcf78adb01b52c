// Prompts of different sizes for one stream, and how a test sends them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/synchronization/notification.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/sizes.h"
#include "tests/client/fake_server.h"

namespace structkv::client {

using Sessions = std::vector<absl::StatusOr<std::unique_ptr<CompressSession>>>;

// As SmallOpen() but for these sizes.
inline BatchPrompt PromptOf(uint32_t tokens, uint32_t layers) {
  BatchPrompt prompt;
  prompt.open = SmallOpen();
  prompt.open.set_prompt_tokens(tokens);
  prompt.open.mutable_geometry()->set_layer_count(layers);
  return prompt;
}

// Three, no two alike.
inline std::vector<BatchPrompt> Ragged() {
  return {PromptOf(6, 2), PromptOf(11, 3), PromptOf(5, 1)};
}

constexpr v1::Tensor kInputs[] = {v1::TENSOR_WINDOW_QUERIES, v1::TENSOR_KEYS, v1::TENSOR_VALUES};

// What a prompt sends as a layer's tensor, different for each prompt.
inline std::string InputOf(const v1::Open& open, uint32_t layer, v1::Tensor tensor) {
  return TestTensor(layer + 7 * open.prompt_tokens(), tensor,
                    InputTensorBytes(open, OpenedFor(open), tensor));
}

inline absl::Status SendLayer(CompressSession& session, uint32_t layer) {
  const std::string queries = InputOf(session.open(), layer, v1::TENSOR_WINDOW_QUERIES);
  const std::string keys = InputOf(session.open(), layer, v1::TENSOR_KEYS);
  const std::string values = InputOf(session.open(), layer, v1::TENSOR_VALUES);
  LayerTensors tensors;
  tensors.window_queries = AsBytes(queries);
  tensors.keys = AsBytes(keys);
  tensors.values = AsBytes(values);
  return session.SendLayer(layer, tensors);
}

// Sends all layers and the commit, as far as it goes.
inline absl::Status SendAll(CompressSession& session) {
  for (uint32_t layer = 0; layer < session.open().geometry().layer_count(); ++layer) {
    absl::Status status = SendLayer(session, layer);
    if (!status.ok()) return status;
  }
  return session.Commit();
}

// Checks that the server has all of a prompt, and nothing else.
inline void ExpectAllOf(const Received& received) {
  const v1::Open& open = received.open;
  uint64_t total = 0;
  for (uint32_t layer = 0; layer < open.geometry().layer_count(); ++layer) {
    for (v1::Tensor tensor : kInputs) {
      const auto found = received.tensors.find({layer, tensor});
      ASSERT_NE(found, received.tensors.end()) << "layer " << layer << " tensor " << tensor;
      EXPECT_TRUE(found->second == InputOf(open, layer, tensor)) << "layer " << layer;
      total += found->second.size();
    }
  }
  EXPECT_TRUE(received.committed);
  EXPECT_EQ(received.commit.layer_count(), open.geometry().layer_count());
  EXPECT_EQ(received.commit.input_bytes(), total);
}

// Checks that a session has all of its answers, and nothing else.
inline void ExpectAnswered(CompressSession& session) {
  const auto result = session.Collect();
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->layers.size(), session.open().geometry().layer_count());
  for (const LayerResult& layer : result->layers) {
    const std::string want = TestTensor(layer.layer + 100, v1::TENSOR_KEYS, layer.keys.size());
    EXPECT_TRUE(AsBytes(want) == absl::Span<const std::byte>(layer.keys.span()));
  }
  EXPECT_EQ(result->summary.logical_length(), session.open().prompt_tokens());
}

// Reads the next message, which must be the `open` of a prompt.
inline v1::Open NextOpen(Stream* stream) {
  v1::CompressRequest request;
  EXPECT_TRUE(stream->Read(&request) && request.has_open());
  return request.open();
}

// A layer of any prompt of Ragged().
inline absl::StatusOr<LayerTensors> Zeros(size_t prompt, uint32_t /*layer*/) {
  static const std::byte zeros[11 * 16] = {};
  LayerTensors tensors;
  tensors.window_queries = absl::MakeConstSpan(zeros, 2 * 2 * 16);
  tensors.keys = absl::MakeConstSpan(zeros, Ragged()[prompt].open.prompt_tokens() * 16);
  tensors.values = tensors.keys;
  return tensors;
}

// A server that behaves, a client, and what the server has received, which may be looked at once
// the stream has ended.
class BatchServerTest : public ::testing::Test {
 protected:
  BatchServerTest()
      : server_([this](int, grpc::ServerContext* context, Stream* stream) {
          const grpc::Status status = BehaveInBatch(stream, &received_);
          cancelled_ = context->IsCancelled();
          ended_.Notify();
          return status;
        }),
        client_(ClientOf(server_)) {}

  std::map<uint32_t, Received> received_;
  bool cancelled_ = false;
  absl::Notification ended_;
  FakeServer server_;
  std::unique_ptr<Client> client_;
};

}  // namespace structkv::client
