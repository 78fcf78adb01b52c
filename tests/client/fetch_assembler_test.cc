// How a fetch is put together whose keys and values come by transfers, and what of a server that
// lies about them is refused.
#include "client/cpp/fetch_assembler.h"

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/fake_holder.h"

namespace structkv::client {
namespace {

using internal::BytesPool;
using internal::FetchAssembler;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A message of a layer, with its positions, keys and values.
v1::FetchCacheResponse Layer(uint32_t number) {
  v1::FetchCacheResponse response;
  v1::LayerResult* layer = response.mutable_layer();
  layer->set_layer(number);
  layer->set_kept_tokens(3);
  layer->set_complete(true);
  for (const v1::Tensor tensor : {v1::TENSOR_POSITIONS, v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
    v1::TensorPiece* piece = layer->add_pieces();
    piece->set_layer(number);
    piece->set_tensor(tensor);
    if (tensor == v1::TENSOR_POSITIONS) {
      piece->set_data(TensorBytes(number, tensor));
    } else {
      piece->mutable_transfer()->set_key("key" + std::to_string(number));
      piece->mutable_transfer()->set_size_bytes(48);
    }
  }
  return response;
}

class FetchAssemblerTest : public ::testing::Test {
 protected:
  FetchAssemblerTest() : options_(Quick(1)) {
    assembler_ = std::make_unique<FetchAssembler>(
        options_, pool_.get(), [this](const LayerResult& layer, const std::string& key) {
          layers_.push_back(std::to_string(layer.layer) + key);
          EXPECT_EQ(layer.keys.data(), room_.data() + (layer.layer - 1) * 128);
          EXPECT_EQ(layer.values.data(), layer.keys.data() + 64);
        });
    assembler_->UseRoom({room_.data(), room_.size(), nullptr}, {});
    Begin();
  }
  void Begin() {
    v1::FetchCacheRequest request;
    request.add_transports(v1::TRANSPORT_NCCL);
    assembler_->StartStream(request);
    v1::FetchCacheResponse info;
    *info.mutable_info() = Info();
    info.mutable_info()->set_transport(v1::TRANSPORT_NCCL);
    EXPECT_TRUE(Add(info).ok());
  }
  absl::Status Add(const v1::FetchCacheResponse& response) {
    const auto decoded = wire::DecodeFetchResponse(wire::Encode(response));
    return decoded.ok() ? assembler_->Add(*decoded) : decoded.status();
  }
  // A layer that `change` has changed.
  void ExpectBroken(const std::function<void(v1::LayerResult*)>& change, const std::string& text) {
    v1::FetchCacheResponse layer = Layer(1);
    change(layer.mutable_layer());
    const absl::Status status = Add(layer);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
    EXPECT_THAT(layers_, ElementsAre());
  }

  const FetchOptions options_;
  const std::shared_ptr<BytesPool> pool_ = std::make_shared<BytesPool>(1 << 20);
  std::vector<std::byte> room_ = std::vector<std::byte>(256);
  std::vector<std::string> layers_;
  std::unique_ptr<FetchAssembler> assembler_;
};

TEST_F(FetchAssemblerTest, LayersHaveTheKeysOfTheirTransfers) {
  EXPECT_TRUE(Add(Layer(1)).ok());
  EXPECT_TRUE(Add(Layer(2)).ok());
  EXPECT_THAT(layers_, ElementsAre("1key1", "2key2"));
  EXPECT_EQ(assembler_->received_bytes(), Info().total_bytes());
}

TEST_F(FetchAssemblerTest, GoesBackToALayer) {
  EXPECT_TRUE(Add(Layer(1)).ok());
  v1::FetchCacheResponse part = Layer(2);
  part.mutable_layer()->mutable_pieces()->RemoveLast();
  part.mutable_layer()->set_complete(false);
  EXPECT_TRUE(Add(part).ok());
  EXPECT_TRUE(assembler_->GoBackTo(1).ok());
  EXPECT_EQ(assembler_->received_bytes(), Info().layer_bytes(0));
  Begin();
  EXPECT_TRUE(Add(Layer(2)).ok());
  EXPECT_TRUE(assembler_->GoBackTo(0).ok());
  EXPECT_EQ(assembler_->received_bytes(), 0U);
  Begin();
  EXPECT_TRUE(Add(Layer(1)).ok());
  EXPECT_THAT(layers_, ElementsAre("1key1", "2key2", "1key1"));
}

TEST_F(FetchAssemblerTest, DataWhereATransferIsDue) {
  ExpectBroken([](auto* layer) { layer->mutable_pieces(1)->set_data(std::string(48, 'k')); },
               "no transfer, and a transfer is due");
}

TEST_F(FetchAssemblerTest, ARangeWhereATransferIsDue) {
  ExpectBroken([](auto* layer) { layer->mutable_pieces(1)->mutable_range()->set_size_bytes(48); },
               "no transfer, and a transfer is due");
}

TEST_F(FetchAssemblerTest, ATransferOfPositions) {
  ExpectBroken(
      [](auto* layer) {
        layer->mutable_pieces(0)->mutable_transfer()->set_key("key1");
        layer->mutable_pieces(0)->mutable_transfer()->set_size_bytes(12);
      },
      "a transfer, which is not due");
}

TEST_F(FetchAssemblerTest, ATransferOfAPart) {
  ExpectBroken(
      [](auto* layer) { layer->mutable_pieces(2)->mutable_transfer()->set_size_bytes(44); },
      "has 44 bytes, 48 are due");
}

TEST_F(FetchAssemblerTest, ATransferOfTooMuch) {
  ExpectBroken(
      [](auto* layer) { layer->mutable_pieces(1)->mutable_transfer()->set_size_bytes(UINT64_MAX); },
      "is out of place");
}

TEST_F(FetchAssemblerTest, ATransferWithoutAKey) {
  ExpectBroken([](auto* layer) { layer->mutable_pieces(1)->mutable_transfer()->clear_key(); },
               "comes by another transfer");
}

TEST_F(FetchAssemblerTest, KeysAndValuesByTwoTransfers) {
  ExpectBroken([](auto* layer) { layer->mutable_pieces(2)->mutable_transfer()->set_key("other"); },
               "comes by another transfer than the layer's other rows");
}

}  // namespace
}  // namespace structkv::client
