#include "service/transport/nccl/transfer_order.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace structkv::nccl {
namespace {

using ::testing::HasSubstr;

Transfer Own(Direction direction, std::vector<int64_t> lengths) {
  static std::byte byte;  // never touched
  Transfer transfer;
  transfer.direction = direction;
  for (int64_t length : lengths) transfer.buffers.push_back({&byte, length});
  return transfer;
}

absl::Status Add(TransferOrder& order, const std::string& key, std::vector<int64_t> lengths = {1}) {
  Transfer transfer = Own(Direction::kReceive, lengths);
  return order.Add(key, transfer);
}

absl::Status AddOffer(TransferOrder& order, const std::string& key,
                      std::vector<int64_t> lengths = {1}, Direction direction = Direction::kSend) {
  return order.Add(Offer{key, direction, std::move(lengths)});
}

TEST(TransferOrderTest, NumbersInTheOrderInWhichBothAreReady) {
  TransferOrder order;
  EXPECT_EQ(Add(order, "a"), absl::OkStatus());
  EXPECT_EQ(Add(order, "b"), absl::OkStatus());
  EXPECT_EQ(AddOffer(order, "c"), absl::OkStatus());
  EXPECT_FALSE(order.has_next());
  EXPECT_EQ(AddOffer(order, "b"), absl::OkStatus());
  EXPECT_EQ(Add(order, "c"), absl::OkStatus());
  EXPECT_EQ(AddOffer(order, "a"), absl::OkStatus());
  EXPECT_TRUE(order.has_next());
  EXPECT_EQ(order.last_sequence(), 0u);
  const std::vector<TransferOrder::Numbered> numbered = order.Take();
  ASSERT_EQ(numbered.size(), 3u);
  for (uint64_t i = 0; i < 3; ++i) EXPECT_EQ(numbered[i].sequence, i + 1);
  EXPECT_EQ(numbered[0].key, "b");
  EXPECT_EQ(numbered[1].key, "c");
  EXPECT_EQ(numbered[2].key, "a");
  EXPECT_TRUE(order.Take().empty());
  EXPECT_EQ(order.last_sequence(), 3u);
  EXPECT_EQ(Add(order, "a"), absl::OkStatus());  // the key is free again
}

TEST(TransferOrderTest, SaysWhatDoesNotFit) {
  TransferOrder order;
  EXPECT_EQ(Add(order, "n", {1, 2}), absl::OkStatus());
  EXPECT_EQ(AddOffer(order, "n", {1}), absl::OkStatus());
  EXPECT_EQ(Add(order, "l", {1, 2}), absl::OkStatus());
  EXPECT_EQ(AddOffer(order, "l", {1, 3}), absl::OkStatus());
  EXPECT_EQ(Add(order, "d"), absl::OkStatus());
  EXPECT_EQ(AddOffer(order, "d", {1}, Direction::kReceive), absl::OkStatus());
  EXPECT_FALSE(order.has_next());
  const std::vector<TransferOrder::Mismatch> mismatched = order.TakeMismatches();
  ASSERT_EQ(mismatched.size(), 3u);
  EXPECT_EQ(mismatched[0].why,
            absl::InvalidArgumentError("transfer 'n': 1 buffers were offered, 2 are needed"));
  EXPECT_EQ(mismatched[1].why,
            absl::InvalidArgumentError("transfer 'l': buffer 1 has 3 bytes, 2 are needed"));
  EXPECT_EQ(mismatched[2].why, absl::InvalidArgumentError("transfer 'd': both ends receive"));
  EXPECT_EQ(order.last_sequence(), 0u);
}

TEST(TransferOrderTest, RefusesOffersOutOfRange) {
  TransferOrder order;
  const auto refused = [&](const Offer& offer, const char* text) {
    const absl::Status status = order.Add(offer);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  };
  refused({"", Direction::kSend, {}}, "key has 0 bytes, 1 to 128");
  refused({std::string(129, 'k'), Direction::kSend, {}}, "key has 129 bytes");
  refused({"k", Direction::kSend, {-1}}, "a buffer of -1 bytes, 0 to 1099511627776");
  refused({"k", Direction::kSend, {kMaxBufferBytes + 1}}, "a buffer of 1099511627777 bytes");
  refused({"k", Direction::kSend, std::vector<int64_t>(9)}, "has 9 buffers, at most 8");
}

TEST(TransferOrderTest, DropsOffersAndWhatWaitsForLong) {
  TransferOrder order;
  ASSERT_EQ(AddOffer(order, "offer"), absl::OkStatus());
  EXPECT_TRUE(order.DropOffer("offer"));
  EXPECT_FALSE(order.DropOffer("offer"));
  ASSERT_EQ(AddOffer(order, "offer"), absl::OkStatus());
  ASSERT_EQ(Add(order, "own"), absl::OkStatus());
  const auto since_before = [&order](Clock::time_point limit) {
    return order.Withdraw(
        [limit](const TransferOrder::Waiting& waiting) { return waiting.since < limit; });
  };
  EXPECT_TRUE(since_before(Clock::now() - std::chrono::seconds(10)).empty());
  const auto late = since_before(Clock::now() + std::chrono::seconds(1));
  ASSERT_EQ(late.size(), 1U);
  EXPECT_EQ(late[0].key, "own");
  EXPECT_FALSE(late[0].offered);
  EXPECT_EQ(TransferText("a\xff'"), "transfer 'a\\xff\\''");
}

// Until it has its number, either end can still leave, and the other waits on.
TEST(TransferOrderTest, WhatHasNoNumberCanBeTakenBack) {
  TransferOrder order;
  const auto offered = [](const TransferOrder::Waiting& waiting) { return waiting.offered; };
  ASSERT_EQ(Add(order, "a"), absl::OkStatus());
  ASSERT_EQ(AddOffer(order, "a"), absl::OkStatus());
  EXPECT_EQ(Add(order, "a").code(), absl::StatusCode::kAlreadyExists);
  ASSERT_EQ(Add(order, "not offered"), absl::OkStatus());
  const auto own = order.Withdraw(offered);
  ASSERT_EQ(own.size(), 1U);
  EXPECT_TRUE(own[0].offered);
  EXPECT_FALSE(order.has_next());
  ASSERT_EQ(Add(order, "a"), absl::OkStatus());
  EXPECT_TRUE(order.has_next());
  EXPECT_TRUE(order.DropOffer("a"));
  EXPECT_FALSE(order.has_next());
  ASSERT_EQ(AddOffer(order, "a"), absl::OkStatus());
  EXPECT_EQ(order.Take().size(), 1U);
  EXPECT_TRUE(order.Withdraw(offered).empty());
}

TEST(TransferOrderTest, BoundsTheOffersThatWait) {
  TransferOrder order;
  for (size_t i = 0; i < kMaxWaitingOffers; ++i) {
    ASSERT_EQ(AddOffer(order, "offer" + std::to_string(i)), absl::OkStatus());
    ASSERT_EQ(Add(order, "own" + std::to_string(i)), absl::OkStatus());
  }
  EXPECT_EQ(AddOffer(order, "more"),
            absl::ResourceExhaustedError("1024 offers wait, at most 1024 are allowed"));
  EXPECT_EQ(Add(order, "more"), absl::OkStatus());
  EXPECT_EQ(AddOffer(order, "offer0").code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(Add(order, "own0").code(), absl::StatusCode::kAlreadyExists);
}

}  // namespace
}  // namespace structkv::nccl
