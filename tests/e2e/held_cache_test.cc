// Caches that stay in the server: what is fetched is what an inline answer would have been, to the
// byte, for every range of layers and heads.
#include <algorithm>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/v1/compression.grpc.pb.h"
#include "tests/e2e/held_test.h"
#include "tests/e2e/held_ways.h"
#include "tests/testing/pull.h"
#include "tests/testing/shards.h"

namespace structkv::testkit {
namespace {

class HeldCacheTest : public HeldTest, public ::testing::WithParamInterface<HeldParam> {};

TEST_P(HeldCacheTest, WhatIsFetchedIsTheInlineAnswer) {
  Start(HoldOptions());
  const v1::Open open = HeldOpen(GetParam());
  const uint32_t layers = open.geometry().layer_count();
  const uint32_t heads = open.geometry().kv_head_count();
  const PromptData data(open, 31);
  const Outcome inline_outcome = Run(AllMessages(data));
  ExpectSuccess(data, inline_outcome);
  const Answer whole = Assemble(inline_outcome);

  const Answer held = Hold(data);
  ASSERT_TRUE(held.summary.has_value());
  EXPECT_EQ(held.summary->held().lease_millis(), 60000U);
  EXPECT_EQ(held.summary->fingerprint(), whole.summary->fingerprint());
  EXPECT_EQ(held.summary->kv_blocks(), whole.summary->kv_blocks());
  uint64_t bytes = 0;
  for (const auto& [index, layer] : whole.layers) {
    const LayerAnswer& answer = held.layers.at(index);
    for (const auto& [tensor, content] : layer.tensors) {
      const bool returned = tensor == v1::TENSOR_POSITIONS || tensor == v1::TENSOR_SALIENCY;
      EXPECT_EQ(answer.tensors.contains(tensor), returned) << v1::Tensor_Name(tensor);
      EXPECT_TRUE(!returned || answer.tensors.at(tensor) == content) << v1::Tensor_Name(tensor);
      if (tensor != v1::TENSOR_SALIENCY) bytes += content.size();
    }
    EXPECT_EQ(answer.metrics.has_value(), layer.metrics.has_value());
  }
  EXPECT_EQ(held.summary->held().size_bytes(), bytes);
  const std::string handle = held.summary->held().handle();

  const Fetched fetched = Fetch(channel(), FetchRequest(handle));
  ASSERT_TRUE(fetched.status.ok()) << fetched.status.error_message();
  EXPECT_THAT(fetched.faults, ::testing::IsEmpty());
  const v1::CacheInfo& info = *fetched.info;
  EXPECT_EQ(info.total_bytes(), bytes);
  EXPECT_EQ(info.geometry().SerializeAsString(), [&] {
    v1::ModelGeometry geometry = open.geometry();
    if (geometry.value_dim() == 0) geometry.set_value_dim(geometry.key_dim());
    return geometry.SerializeAsString();
  }());
  EXPECT_EQ(info.dtype(), open.dtype());
  EXPECT_EQ(info.layout(), open.layout());
  EXPECT_EQ(info.block_tokens(), open.paged().block_tokens());
  EXPECT_EQ(info.fingerprint(), whole.summary->fingerprint());
  EXPECT_EQ(info.logical_length(), open.prompt_tokens());
  EXPECT_EQ(info.kv_length(), whole.summary->kv_length());
  EXPECT_EQ(info.next_position(), whole.summary->next_position());
  EXPECT_EQ(info.method().SerializeAsString(), whole.opened->method().SerializeAsString());
  EXPECT_EQ(info.rotary().SerializeAsString(), whole.opened->rotary().SerializeAsString());
  ExpectSlice(open, whole, fetched, 0, layers, 0, heads);
  for (const auto& [index, layer] : whole.layers) {
    EXPECT_EQ(fetched.layers.at(index).metrics.has_value(), layer.metrics.has_value());
    if (layer.metrics.has_value()) {
      EXPECT_EQ(fetched.layers.at(index).metrics->entropy(), layer.metrics->entropy());
    }
  }

  // By layers, and by heads for other tensor-parallel sizes.
  for (uint32_t first = 0; first < layers; ++first) {
    v1::FetchCacheRequest request = FetchRequest(handle);
    request.set_first_layer(first);
    ExpectSlice(open, whole, Fetch(channel(), request), first, layers - first, 0, heads);
    request.set_layer_count(1);
    request.set_checksums(true);
    ExpectSlice(open, whole, Fetch(channel(), request), first, 1, 0, heads);
  }
  for (const uint32_t ranks : {2U, 4U}) {
    if (heads % ranks != 0) continue;
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      v1::FetchCacheRequest request = FetchRequest(handle);
      request.set_first_kv_head(rank * heads / ranks);
      request.set_kv_head_count(heads / ranks);
      request.set_max_response_message_bytes(64 << 10);
      const Fetched part = Fetch(channel(), request);
      EXPECT_LE(part.longest_message, 64U << 10);
      ExpectSlice(open, whole, part, 0, layers, rank * heads / ranks, heads / ranks);
    }
  }

  // From any byte on.
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.set_first_kv_head(heads - 1);
  request.set_kv_head_count(1);
  const std::string last_head = Fetch(channel(), request).bytes;
  for (const uint64_t skip : {uint64_t{1}, uint64_t{777}, last_head.size() / 2,
                              last_head.size() - 1, uint64_t{last_head.size()}}) {
    request.set_skip_bytes(skip);
    const Fetched rest = Fetch(channel(), request);
    EXPECT_TRUE(rest.status.ok()) << rest.status.error_message();
    EXPECT_THAT(rest.faults, ::testing::IsEmpty());
    EXPECT_TRUE(rest.bytes == last_head.substr(skip)) << skip;
  }
  EXPECT_TRUE(Release(channel(), handle).ok());
}

INSTANTIATE_TEST_SUITE_P(, HeldCacheTest, HeldGrid(), HeldName);

class HeldWaysTest : public HeldTest {};

TEST_F(HeldWaysTest, LongMessagesAreCutToTheCallersLimit) {
  Start(HoldOptions());
  v1::Open open = WideOpen(3000);
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  open.mutable_method()->mutable_full();
  const PromptData data(open, 3);
  const Answer whole = Assemble(Run(AllMessages(data)));
  const std::string handle = Hold(data).summary->held().handle();
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.set_max_response_message_bytes(64 << 10);
  const Fetched all = Fetch(channel(), request);
  EXPECT_LE(all.longest_message, 64U << 10);
  EXPECT_GT(all.messages, all.bytes.size() >> 16);
  ExpectSlice(open, whole, all, 0, 4, 0, 4);
  request.set_first_kv_head(1);
  request.set_kv_head_count(2);
  const Fetched middle = Fetch(channel(), request);
  EXPECT_LE(middle.longest_message, 64U << 10);
  ExpectSlice(open, whole, middle, 0, 4, 1, 2);
  EXPECT_TRUE(Release(channel(), handle).ok());
}

TEST_F(HeldWaysTest, PulledRowsAreHeld) {
  Start(HoldOptions());
  const v1::Open open = WideOpen();
  const PromptData plain(open, 9);
  const Answer whole = Assemble(Run(AllMessages(plain)));
  const PromptData data(Held(open), 9);
  const Answer held = Assemble(RunWithPull(channel(), data, v1::PULL_VALUES, 2));
  EXPECT_THAT(held.faults, ::testing::IsEmpty());
  ASSERT_TRUE(held.summary.has_value());
  const std::string handle = held.summary->held().handle();
  ExpectSlice(open, whole, Fetch(channel(), FetchRequest(handle)), 0, 4, 0, 4);
  EXPECT_TRUE(Release(channel(), handle).ok());
}

// Each rank has a handle of its own, with its heads under the model's numbers.
TEST_F(HeldWaysTest, RanksHoldTheirOwnHeads) {
  Start(HoldOptions());
  v1::Open open = WideOpen();
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  open.mutable_method()->mutable_structkv()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
  const PromptData plain(open, 12);
  const Answer whole = Assemble(Run(AllMessages(plain)));
  const std::vector<PromptData> ranks = SplitByRanks(PromptData(Held(open), 12), 2);
  Call zero(channel());
  Call one(channel());
  for (const v1::CompressRequest& message : AllMessages(ranks[0])) zero.Send(message);
  for (const v1::CompressRequest& message : AllMessages(ranks[1])) one.Send(message);
  zero.HalfClose();
  one.HalfClose();
  std::vector<std::string> handles;
  for (Call* call : {&zero, &one}) {
    const Answer held = Assemble(call->Finish());
    ASSERT_TRUE(held.summary.has_value());
    handles.push_back(held.summary->held().handle());
  }
  EXPECT_NE(handles[0], handles[1]);
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const Fetched own = Fetch(channel(), FetchRequest(handles[rank]));
    ExpectSlice(open, whole, own, 0, 4, 2 * rank, 2);
    EXPECT_EQ(own.info->held_kv_heads().begin(), 2 * rank);
    v1::FetchCacheRequest request = FetchRequest(handles[rank]);
    request.set_first_kv_head(2 * rank + 1);
    ExpectSlice(open, whole, Fetch(channel(), request), 0, 4, 2 * rank + 1, 1);
  }
  v1::FetchCacheRequest request = FetchRequest(handles[1]);
  request.set_first_kv_head(1);
  request.set_kv_head_count(2);
  ExpectFetchFailure(Fetch(channel(), request), grpc::StatusCode::INVALID_ARGUMENT,
                     {"first_kv_head is 1", "kv_head_count 2", "KV heads 2 to 3 are held"});
  for (const std::string& handle : handles) EXPECT_TRUE(Release(channel(), handle).ok());
}

TEST_F(HeldWaysTest, PromptsOfABatchHaveTheirOwnHandles) {
  Start(HoldOptions());
  v1::Open open = WideOpen();
  const PromptData plain(open, 4);
  const Answer whole = Assemble(Run(AllMessages(plain)));
  open = Held(open);
  open.set_batch_prompt_count(2);
  const PromptData data(open, 4);
  std::vector<v1::CompressRequest> messages;
  for (const v1::CompressRequest& message : AllMessages(data)) {
    for (const uint32_t prompt : {0U, 1U}) {
      messages.push_back(message);
      messages.back().set_prompt(prompt);
    }
  }
  const Outcome outcome = Run(messages);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  std::vector<std::string> handles;
  for (const v1::CompressResponse& response : outcome.responses) {
    if (response.has_summary()) handles.push_back(response.summary().held().handle());
  }
  ASSERT_EQ(handles.size(), 2U);
  EXPECT_NE(handles[0], handles[1]);
  for (const std::string& handle : handles) {
    ExpectSlice(plain.open(), whole, Fetch(channel(), FetchRequest(handle)), 0, 4, 0, 4);
    EXPECT_TRUE(Release(channel(), handle).ok());
  }
}

TEST_F(HeldWaysTest, CapabilitiesSayWhatIsHeld) {
  Start(HoldOptions());
  const PromptData data(WideOpen(), 4);
  const std::string handle = Hold(data).summary->held().handle();
  grpc::ClientContext context;
  v1::GetCapabilitiesResponse response;
  ASSERT_TRUE(v1::Compression::NewStub(channel())->GetCapabilities(&context, {}, &response).ok());
  const v1::Limits& limits = response.limits();
  EXPECT_EQ(limits.hold_budget_bytes(), 64U << 20);
  EXPECT_LT(limits.hold_available_bytes(), 64U << 20);
  EXPECT_EQ(limits.default_hold_lease_millis(), 60000U);
  EXPECT_EQ(limits.max_hold_lease_millis(), 600000U);
  EXPECT_TRUE(Release(channel(), handle).ok());
}

}  // namespace
}  // namespace structkv::testkit
