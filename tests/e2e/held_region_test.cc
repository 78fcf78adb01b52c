// Held caches that are fetched into shared memory: as in messages, to the byte, and with nothing
// but ranges of keys and values in the messages.
#include "tests/e2e/held_region.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/held_ways.h"
#include "tests/testing/pull.h"

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

class HeldRegionTest : public HoldingRegionTest {
 protected:
  // Fetches into the region, which is full of something else before.
  Fetched FetchInto(const v1::FetchCacheRequest& request) {
    std::memset(file_->data(), 0xa5, file_->size());
    Fetched fetched = Fetch(channel(), Into(request, region_, *file_), {}, file_.get());
    EXPECT_TRUE(fetched.status.ok()) << fetched.status.error_message();
    EXPECT_THAT(fetched.faults, IsEmpty());
    if (!fetched.summary.has_value()) return fetched;
    EXPECT_EQ(fetched.info->transport(), v1::TRANSPORT_SHARED_MEMORY);
    EXPECT_EQ(fetched.info->transport_reason(), "");
    EXPECT_EQ(fetched.summary->transport(), "shared_memory");
    return fetched;
  }
};

class HeldRegionWaysTest : public HeldRegionTest,
                           public ::testing::WithParamInterface<HeldParam> {};

TEST_P(HeldRegionWaysTest, IsFetchedAsInline) {
  const v1::Open open = HeldOpen(GetParam());
  const PromptData data(open, 31);
  const Answer whole = Assemble(Run(AllMessages(data)));
  const std::string handle = Hold(data).summary->held().handle();
  const uint32_t layers = open.geometry().layer_count();
  const uint32_t heads = open.geometry().kv_head_count();

  const Fetched all = FetchInto(FetchRequest(handle));
  ExpectSlice(open, whole, all, 0, layers, 0, heads);
  size_t in_messages = 0;
  for (const auto& [index, layer] : whole.layers) {
    for (const auto& [tensor, bytes] : layer.tensors) {
      const bool elsewhere = tensor == v1::TENSOR_KEYS || tensor == v1::TENSOR_VALUES;
      if (!elsewhere && tensor != v1::TENSOR_SALIENCY) in_messages += bytes.size();
    }
  }
  EXPECT_EQ(all.message_bytes, in_messages) << "positions and scales alone";

  // Some layers and heads, in small messages, from any byte on; what was skipped is not written.
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.set_first_layer(1);
  request.set_layer_count(layers - 2);
  request.set_first_kv_head(heads / 2);
  request.set_max_response_message_bytes(64 << 10);
  const Fetched part = FetchInto(request);
  ExpectSlice(open, whole, part, 1, layers - 2, heads / 2, heads - heads / 2);
  for (const uint64_t skip : {uint64_t{1}, uint64_t{777}, part.bytes.size() / 2,
                              part.bytes.size() - 1, uint64_t{part.bytes.size()}}) {
    request.set_skip_bytes(skip);
    const Fetched rest = FetchInto(request);
    EXPECT_TRUE(rest.bytes == part.bytes.substr(skip)) << skip;
  }
  EXPECT_TRUE(std::all_of(file_->data(), file_->data() + file_->size(), [](char byte) {
    return byte == '\xa5';
  })) << "the last fetch had nothing left to write";
  EXPECT_EQ(server().sessions().budget().reserved_bytes(), neighbour_bytes())
      << "nothing is arranged in messages";
  EXPECT_TRUE(Release(channel(), handle).ok());
}

INSTANTIATE_TEST_SUITE_P(, HeldRegionWaysTest, HeldGrid(), HeldName);

TEST_F(HeldRegionTest, ItsPlaceIsWhereTheProtoSays) {
  v1::Open open = WideOpen();
  open.mutable_method()->mutable_pyramidkv()->mutable_kv_budget()->set_ratio(0.3);
  const PromptData data(open, 2);
  const std::string handle = Hold(data).summary->held().handle();
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.set_first_layer(1);
  request.set_kv_head_count(3);
  request = Into(request, region_, *file_, 128);
  const Fetched fetched = Fetch(channel(), request, {}, file_.get());
  ASSERT_TRUE(fetched.status.ok()) << fetched.status.error_message();
  uint64_t room = 0;
  for (const auto& [index, layer] : fetched.layers) {
    room = std::max<uint64_t>(room, (layer.tensors.at(v1::TENSOR_KEYS).size() + 63) / 64 * 64);
  }
  for (const auto& [index, layer] : fetched.layers) {
    const uint64_t at = 128 + (index - 1) * 2 * room;
    for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
      const std::string& bytes = layer.tensors.at(tensor);
      EXPECT_TRUE(std::string(file_->data() + at + (tensor == v1::TENSOR_VALUES ? room : 0),
                              bytes.size()) == bytes)
          << "layer " << index;
    }
  }
  // So much and not a byte less.
  request.mutable_result_range()->set_size_bytes(3 * 2 * room);
  EXPECT_TRUE(Fetch(channel(), request, {}, file_.get()).status.ok());
  request.mutable_result_range()->set_size_bytes(3 * 2 * room - 1);
  ExpectFetchFailure(Fetch(channel(), request), grpc::StatusCode::INVALID_ARGUMENT,
                     {"result_range: size_bytes is " + std::to_string(6 * room - 1), "3 layers of",
                      std::to_string(2 * room) + " bytes are needed"});
  EXPECT_TRUE(Release(channel(), handle).ok());
}

TEST_F(HeldRegionTest, InfoAloneSaysWhatRoomIsNeeded) {
  const v1::Open open = WideOpen();
  const std::string handle = Hold(PromptData(open, 2)).summary->held().handle();
  const Fetched all = Fetch(channel(), FetchRequest(handle));
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.set_info_only(true);
  const Fetched info = Fetch(channel(), request);
  ASSERT_TRUE(info.status.ok()) << info.status.error_message();
  EXPECT_THAT(info.faults, IsEmpty());
  EXPECT_TRUE(info.layers.empty());
  EXPECT_EQ(info.info->SerializeAsString(), all.info->SerializeAsString());
  EXPECT_EQ(info.summary->sent_bytes(), 0U);
  EXPECT_EQ(info.summary->total_bytes(), all.summary->total_bytes());
  EXPECT_TRUE(Release(channel(), handle).ok());
}

// The other direction: what is held came over shared memory, pulled and whole.
TEST_F(HeldRegionTest, HoldsWhatLiesInSharedMemory) {
  for (const bool full : {true, false}) {
    SCOPED_TRACE(full);
    v1::Open open = WideOpen();
    if (full) {
      open.mutable_method()->mutable_full();
    } else {
      open.set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
    }
    const PromptData data(open, 9);
    const Answer whole = Assemble(Run(AllMessages(data)));
    Placed placed = Place(data, /*results=*/false);
    std::vector<v1::CompressRequest> messages = Messages(data, &placed);
    *messages[0].mutable_open() = Held(messages[0].open());
    const Answer held = Assemble(placed.ranged->Get(Run(messages)));
    EXPECT_THAT(held.faults, IsEmpty());
    ASSERT_TRUE(held.summary.has_value());
    EXPECT_EQ(held.summary->transport(), "shared_memory");
    std::memset(placed.file->data(), 0, placed.file->size());
    const std::string handle = held.summary->held().handle();
    ExpectSlice(open, whole, FetchInto(FetchRequest(handle)), 0, 4, 0, 4);
    ExpectSlice(open, whole, Fetch(channel(), FetchRequest(handle)), 0, 4, 0, 4);
    EXPECT_TRUE(Release(channel(), handle).ok());
  }
}

TEST_F(HeldRegionTest, HoldsRowsThatArePulledFromSharedMemory) {
  for (const v1::Pull pull : {v1::PULL_VALUES, v1::PULL_KEYS_AND_VALUES}) {
    SCOPED_TRACE(pull);
    v1::Open open = WideOpen();
    open.set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
    const PromptData plain(open, 9);
    const Answer whole = Assemble(Run(AllMessages(plain)));
    const PromptData data(Held(open), 9);
    Placed placed = Place(data, /*results=*/false);
    Call call(channel());
    PullWorker worker(&call, &data, pull);
    call.Send(OpenMessage(placed.ranged->Open(worker.OpenMessage(2).open())));
    uint64_t sent = 0;
    const auto send = [&](const v1::CompressRequest& message) {
      for (const v1::TensorPiece& piece : message.pieces().pieces()) sent += piece.data().size();
      call.Send(placed.ranged->Put(message));
    };
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      send(worker.LayerMessage(layer));
      const auto positions = call.WaitForPull(layer);
      ASSERT_TRUE(positions.has_value());
      send(worker.RowsMessage(layer, *positions));
    }
    call.Send(CommitMessage(data.layers(), sent));
    call.HalfClose();
    const Outcome outcome = call.Finish();
    ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    const Answer held = Assemble(outcome);
    EXPECT_EQ(held.summary->transport(), "shared_memory");
    std::memset(placed.file->data(), 0, placed.file->size());
    const std::string handle = held.summary->held().handle();
    ExpectSlice(open, whole, FetchInto(FetchRequest(handle)), 0, 4, 0, 4);
    EXPECT_TRUE(Release(channel(), handle).ok());
  }
}

}  // namespace
}  // namespace structkv::testkit
