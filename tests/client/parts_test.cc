// The client's parts that need no server.
#include <cstring>

#include "client/cpp/bytes_pool.h"
#include "client/cpp/sent_ranges.h"
#include "gtest/gtest.h"
#include "structkv/sizes.h"

namespace structkv::client {
namespace {

using internal::BytesPool;
using internal::SentRanges;

TEST(SentRangesTest, CountsEachByteOnce) {
  SentRanges sent;
  sent.Add(0, v1::TENSOR_KEYS, 10, 20);
  EXPECT_EQ(sent.bytes(), 10);
  sent.Add(0, v1::TENSOR_KEYS, 10, 20);
  EXPECT_EQ(sent.bytes(), 10);
  sent.Add(0, v1::TENSOR_KEYS, 30, 40);
  sent.Add(0, v1::TENSOR_KEYS, 0, 5);
  EXPECT_EQ(sent.bytes(), 25);
  sent.Add(0, v1::TENSOR_KEYS, 4, 35);
  EXPECT_EQ(sent.bytes(), 40);
  sent.Add(0, v1::TENSOR_KEYS, 40, 41);
  EXPECT_EQ(sent.bytes(), 41);
  EXPECT_EQ(sent.layers(), 1);
}

TEST(SentRangesTest, KeepsTensorsAndLayersApart) {
  SentRanges sent;
  sent.Add(0, v1::TENSOR_KEYS, 0, 10);
  sent.Add(0, v1::TENSOR_VALUES, 0, 10);
  sent.Add(3, v1::TENSOR_KEYS, 0, 10);
  EXPECT_EQ(sent.bytes(), 30);
  EXPECT_EQ(sent.layers(), 2);
}

TEST(BytesPoolTest, ReusesMemoryWithinItsLimit) {
  BytesPool pool(1024);
  Bytes first = pool.Acquire(1000);
  const std::byte* data = first.data();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 64, 0);
  first = Bytes();
  EXPECT_EQ(pool.idle_bytes(), 1024);
  Bytes again = pool.Acquire(900);
  EXPECT_EQ(again.data(), data);
  EXPECT_EQ(again.size(), 900);
  EXPECT_EQ(pool.idle_bytes(), 0);
}

TEST(BytesPoolTest, GivesBackWhatExceedsTheLimit) {
  BytesPool pool(1024);
  pool.Acquire(2048);
  EXPECT_EQ(pool.idle_bytes(), 0);
}

TEST(BytesPoolTest, DoesNotWasteALargeBlockOnASmallRequest) {
  BytesPool pool(1 << 20);
  pool.Acquire(65536);
  const Bytes small = pool.Acquire(64);
  EXPECT_EQ(pool.idle_bytes(), 65536);
}

TEST(BytesPoolTest, LeavesBytesAliveAfterItself) {
  Bytes bytes;
  {
    BytesPool pool(1024);
    bytes = pool.Acquire(100);
  }
  std::memset(bytes.data(), 1, bytes.size());
  EXPECT_EQ(bytes.span()[99], std::byte{1});
}

class SizesTest : public ::testing::Test {
 protected:
  SizesTest() {
    open_.mutable_geometry()->set_layer_count(1);
    open_.mutable_geometry()->set_query_head_count(8);
    open_.mutable_geometry()->set_kv_head_count(2);
    open_.mutable_geometry()->set_key_dim(64);
    open_.set_prompt_tokens(100);
    open_.set_dtype(v1::DTYPE_BF16);
    opened_.add_kept_tokens(10);
    opened_.set_window_tokens(4);
    opened_.set_statistic(v1::STATISTIC_WINDOW_QUERIES);
    for (v1::Tensor tensor :
         {v1::TENSOR_KEYS, v1::TENSOR_VALUES, v1::TENSOR_WINDOW_QUERIES, v1::TENSOR_WINDOW_LSE}) {
      opened_.add_required_tensors(tensor);
    }
  }

  v1::Open open_;
  v1::Opened opened_;
};

TEST_F(SizesTest, OfInputs) {
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_KEYS), 2 * 2 * 100 * 64);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_VALUES), 2 * 2 * 100 * 64);
  open_.mutable_geometry()->set_value_dim(32);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_VALUES), 2 * 2 * 100 * 32);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_WINDOW_QUERIES), 2 * 8 * 4 * 64);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_WINDOW_LSE), 4 * 8 * 4);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_SALIENCY), 0) << "is not required";
  opened_.add_required_tensors(v1::TENSOR_SALIENCY);
  opened_.set_statistic(v1::STATISTIC_SALIENCY);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_SALIENCY), 400);
  opened_.set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_SALIENCY), 800);
}

TEST_F(SizesTest, OfValuesInTheKeys) {
  opened_.mutable_method()->mutable_structkv();
  open_.mutable_geometry()->set_values_in_keys(true);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_KEYS), 2 * 2 * 10 * 64);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_VALUES), 0);
}

TEST_F(SizesTest, OfFp8) {
  opened_.mutable_method()->mutable_structkv();
  open_.set_dtype(v1::DTYPE_F8_E5M2);
  for (v1::Tensor tensor : {v1::TENSOR_KEY_SCALES, v1::TENSOR_VALUE_SCALES}) {
    opened_.add_required_tensors(tensor);
  }
  EXPECT_EQ(QueryDType(open_), v1::DTYPE_BF16);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_KEYS), 2 * 100 * 64);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_WINDOW_QUERIES), 2 * 8 * 4 * 64);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_KEY_SCALES), 0);
  open_.set_kv_scales(v1::KV_SCALES_PER_TENSOR);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_KEY_SCALES), 4);
  open_.set_kv_scales(v1::KV_SCALES_PER_KV_HEAD);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_VALUE_SCALES), 8);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_KEY_SCALES), 8);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_VALUE_SCALES), 8);
  // A rank has the scales of its own heads.
  open_.mutable_shard_group()->set_shard_count(2);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_VALUE_SCALES), 4);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_KEY_SCALES), 4);
  open_.clear_shard_group();
  open_.mutable_geometry()->set_values_in_keys(true);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_VALUE_SCALES), 0);
  open_.set_output(v1::OUTPUT_PLAN);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_KEY_SCALES), 0);
}

TEST_F(SizesTest, OfBlocks) {
  opened_.mutable_method()->mutable_structkv();
  opened_.set_skeleton_tokens(20);
  open_.mutable_paged()->set_block_tokens(16);
  open_.mutable_paged()->set_block_count(9);
  EXPECT_EQ(InputTensorBytes(open_, opened_, v1::TENSOR_KEYS), 2 * 2 * 9 * 16 * 64);
  EXPECT_EQ(SkeletonTensorBytes(open_, opened_, v1::TENSOR_VALUES), 2 * 2 * 32 * 64);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_KEYS), 2 * 2 * 16 * 64);
  EXPECT_EQ(KeptBlocks(open_, 16), 1);
  EXPECT_EQ(KeptBlocks(open_, 17), 2);
  open_.set_output(v1::OUTPUT_PLAN);
  EXPECT_EQ(KeptBlocks(open_, 17), 0);
}

TEST_F(SizesTest, OfOutputs) {
  opened_.mutable_method()->mutable_structkv();
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_POSITIONS), 40);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_KEYS), 2 * 2 * 10 * 64);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_SALIENCY), 0);
  open_.set_return_saliency(true);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_SALIENCY), 400);
  opened_.mutable_method()->mutable_snapkv()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_POSITIONS), 80);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_SALIENCY), 800);
  open_.set_output(v1::OUTPUT_PLAN);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 0, v1::TENSOR_KEYS), 0);
  EXPECT_EQ(OutputTensorBytes(open_, opened_, 1, v1::TENSOR_POSITIONS), 0) << "no such layer";
}

}  // namespace
}  // namespace structkv::client
