// Answers cut into messages: none is too long, and together they are the answer.
#include "service/rpc/response_builder.h"

#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/rpc/open_decoder.h"

namespace structkv::rpc {
namespace {

using ::testing::ElementsAre;

std::string Flatten(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

engine::Buffer Filled(engine::BufferPool* pool, size_t size, int first) {
  engine::Buffer buffer = pool->Acquire(size);
  for (size_t i = 0; i < size; ++i) {
    buffer.data()[i] = static_cast<std::byte>(static_cast<size_t>(first) + i * 7 + i / 251);
  }
  return buffer;
}

std::string Text(const engine::Buffer& buffer) { return {buffer.as<char>(), buffer.size()}; }

template <typename T>
std::string Text(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

// Puts pieces together, and checks that they come in order and at the right places.
class Assembled {
 public:
  template <typename Pieces>
  void Add(const Pieces& pieces, uint32_t layer) {
    for (const v1::TensorPiece& piece : pieces) {
      EXPECT_EQ(piece.layer(), layer);
      EXPECT_FALSE(piece.data().empty());
      if (order_.empty() || order_.back() != piece.tensor()) order_.push_back(piece.tensor());
      std::string& tensor = tensors_[piece.tensor()];
      EXPECT_EQ(piece.offset_bytes(), tensor.size());
      EXPECT_EQ(piece.offset_bytes() % 64, 0) << "pieces hold whole elements";
      tensor += piece.data();
    }
  }
  const std::string& tensor(v1::Tensor tensor) { return tensors_[tensor]; }
  const std::vector<v1::Tensor>& order() const { return order_; }

 private:
  std::map<v1::Tensor, std::string> tensors_;
  std::vector<v1::Tensor> order_;
};

v1::CompressResponse Parse(const OutgoingMessage& message) {
  v1::CompressResponse response;
  EXPECT_TRUE(response.ParseFromString(Flatten(message.bytes)));
  return response;
}

struct Sizes {
  size_t positions;
  size_t keys;
  size_t values;
  size_t saliency;
};

class BuildLayerTest : public ::testing::TestWithParam<Sizes> {
 protected:
  engine::LayerOutput MakeOutput() {
    engine::LayerOutput output;
    output.layer = 5;
    output.kept_tokens = 123;
    output.metrics = {.entropy = 1, .sparsity = 2, .variance = 3};
    for (size_t i = 0; i < GetParam().positions; ++i) {
      output.positions.push_back(static_cast<int32_t>(3 * i));
    }
    output.keys = Filled(&pool_, GetParam().keys, 1);
    output.values = Filled(&pool_, GetParam().values, 2);
    output.saliency = Filled(&pool_, GetParam().saliency, 3);
    return output;
  }

  engine::BufferPool pool_{0};
};

TEST_P(BuildLayerTest, CoversTheTensorsWithinTheLimit) {
  for (int64_t limit :
       {kMinMessageBytes, kMinMessageBytes + 1, int64_t{100'003}, kDefaultMessageBytes}) {
    engine::LayerOutput output = MakeOutput();
    const std::string expected[] = {Text(output.positions), Text(output.keys), Text(output.values),
                                    Text(output.saliency)};
    const std::vector<OutgoingMessage> messages = BuildLayer(std::move(output), limit);
    Assembled assembled;
    int64_t total = 0;
    for (size_t i = 0; i < messages.size(); ++i) {
      const bool is_last = i + 1 == messages.size();
      EXPECT_LE(static_cast<int64_t>(messages[i].bytes.Length()), limit);
      const v1::CompressResponse response = Parse(messages[i]);
      ASSERT_TRUE(response.has_layer());
      const v1::LayerResult& layer = response.layer();
      EXPECT_EQ(layer.layer(), 5);
      EXPECT_EQ(layer.kept_tokens(), 123);
      EXPECT_EQ(layer.has_metrics(), i == 0);
      EXPECT_EQ(layer.complete(), is_last);
      assembled.Add(layer.pieces(), 5);
      int64_t tensor_bytes = 0;
      for (const v1::TensorPiece& piece : layer.pieces()) {
        tensor_bytes += static_cast<int64_t>(piece.data().size());
      }
      EXPECT_EQ(messages[i].tensor_bytes, tensor_bytes);
      total += tensor_bytes;
    }
    EXPECT_EQ(assembled.tensor(v1::TENSOR_POSITIONS), expected[0]);
    EXPECT_EQ(assembled.tensor(v1::TENSOR_KEYS), expected[1]);
    EXPECT_EQ(assembled.tensor(v1::TENSOR_VALUES), expected[2]);
    EXPECT_EQ(assembled.tensor(v1::TENSOR_SALIENCY), expected[3]);
    // No message is sent that the others had room for.
    EXPECT_LE(static_cast<int64_t>(messages.size()), total / (limit - 600) + 1) << limit;
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, BuildLayerTest,
                         ::testing::Values(Sizes{10, 1000, 2000, 0}, Sizes{0, 0, 0, 0},
                                           Sizes{1, 0, 0, 4}, Sizes{20'000, 1, 63, 65},
                                           Sizes{16'320, 65'536, 65'536, 65'472},
                                           Sizes{1000, 5'000'000, 4'999'998, 400'000}));

// About the size at which a layer no longer fits into one message: never too long, and in one as
// long as that is possible.
TEST(BuildLayerLimitTest, OneMessageAsLongAsItFits) {
  engine::BufferPool pool(0);
  size_t most_in_one = 0;
  for (size_t size = kMinMessageBytes - 400; size <= kMinMessageBytes; ++size) {
    engine::LayerOutput output;
    output.keys = Filled(&pool, size, 0);
    const std::vector<OutgoingMessage> messages = BuildLayer(std::move(output), kMinMessageBytes);
    for (const OutgoingMessage& message : messages) {
      ASSERT_LE(message.bytes.Length(), kMinMessageBytes) << size;
    }
    if (messages.size() == 1) most_in_one = size;
  }
  EXPECT_GE(most_in_one, static_cast<size_t>(kMinMessageBytes - 128));
  EXPECT_LT(most_in_one, static_cast<size_t>(kMinMessageBytes));
}

TEST(BuildLayerMemoryTest, MessagesHoldTheTensorsWithoutACopy) {
  engine::BufferPool pool(0);
  engine::LayerOutput output;
  output.keys = Filled(&pool, 1'000'000, 0);
  const auto* begin = reinterpret_cast<const uint8_t*>(output.keys.data());
  const size_t in_use = pool.in_use_bytes();
  std::vector<OutgoingMessage> messages = BuildLayer(std::move(output), 400'000);
  ASSERT_EQ(messages.size(), 3);
  size_t inside = 0;
  for (const OutgoingMessage& message : messages) {
    std::vector<grpc::Slice> slices;
    ASSERT_TRUE(message.bytes.Dump(&slices).ok());
    for (const grpc::Slice& slice : slices) {
      if (slice.begin() >= begin && slice.end() <= begin + 1'000'000) inside += slice.size();
    }
  }
  EXPECT_EQ(inside, 1'000'000);
  messages.pop_back();
  EXPECT_EQ(pool.in_use_bytes(), in_use) << "other messages still refer to it";
  messages.clear();
  EXPECT_EQ(pool.in_use_bytes(), 0);
}

engine::PivotResult MakePivot(int64_t layers, size_t skeleton, size_t centrality) {
  engine::PivotResult result;
  result.decision.pivot_layer = 9;
  result.decision.transition_layer = 8;
  for (int64_t layer = 0; layer < layers; ++layer) {
    result.decision.layers.push_back({.layer = layer,
                                      .metrics = {.entropy = 0.1, .sparsity = 0.2, .variance = 0.3},
                                      .transition = 0.4});
  }
  for (size_t i = 0; i < skeleton; ++i) result.skeleton.push_back(static_cast<int32_t>(i * 2));
  for (size_t i = 0; i < centrality; ++i) {
    result.centrality.push_back(static_cast<float>(i) / 3);
  }
  return result;
}

TEST(BuildPivotTest, CoversTheTensorsWithinTheLimit) {
  // 1,024 layers: the most that a server may allow.
  const engine::PivotResult expected = MakePivot(1024, 20'000, 100'000);
  const std::vector<OutgoingMessage> messages = BuildPivot(expected, kMinMessageBytes);
  Assembled assembled;
  for (size_t i = 0; i < messages.size(); ++i) {
    EXPECT_LE(static_cast<int64_t>(messages[i].bytes.Length()), kMinMessageBytes);
    const v1::CompressResponse response = Parse(messages[i]);
    ASSERT_TRUE(response.has_pivot());
    EXPECT_EQ(response.pivot().pivot_layer(), 9);
    EXPECT_EQ(response.pivot().transition_layer(), 8);
    EXPECT_EQ(response.pivot().layers_size(), i == 0 ? 1024 : 0);
    EXPECT_EQ(response.pivot().complete(), i + 1 == messages.size());
    assembled.Add(response.pivot().pieces(), 9);
  }
  EXPECT_THAT(assembled.order(), ElementsAre(v1::TENSOR_SKELETON_POSITIONS, v1::TENSOR_CENTRALITY));
  EXPECT_EQ(assembled.tensor(v1::TENSOR_SKELETON_POSITIONS), Text(expected.skeleton));
  EXPECT_EQ(assembled.tensor(v1::TENSOR_CENTRALITY), Text(expected.centrality));
}

TEST(BuildPivotTest, OneMessageWithoutCentrality) {
  const std::vector<OutgoingMessage> messages =
      BuildPivot(MakePivot(2, 10, 0), kDefaultMessageBytes);
  ASSERT_EQ(messages.size(), 1);
  const v1::CompressResponse response = Parse(messages[0]);
  EXPECT_TRUE(response.pivot().complete());
  ASSERT_EQ(response.pivot().pieces_size(), 1);
  EXPECT_EQ(response.pivot().pieces(0).tensor(), v1::TENSOR_SKELETON_POSITIONS);
}

TEST(BuildLayerOrderTest, IsThatOfTheProto) {
  engine::BufferPool pool(0);
  engine::LayerOutput output;
  output.positions = {1, 2, 3};
  output.keys = Filled(&pool, 100'000, 1);
  output.values = Filled(&pool, 100'000, 2);
  output.saliency = Filled(&pool, 100'000, 3);
  Assembled assembled;
  for (const OutgoingMessage& message : BuildLayer(std::move(output), kMinMessageBytes)) {
    assembled.Add(Parse(message).layer().pieces(), 0);
  }
  EXPECT_THAT(assembled.order(), ElementsAre(v1::TENSOR_POSITIONS, v1::TENSOR_KEYS,
                                             v1::TENSOR_VALUES, v1::TENSOR_SALIENCY));
}

}  // namespace
}  // namespace structkv::rpc
