#include <cstdint>
#include <cstring>
#include <string>
#include <variant>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/v1/nccl_codec.h"

namespace structkv::nccl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename Content>
Content ThroughClient(const Content& content) {
  return std::get<Content>(*Decode(Encode(ClientMessage(content))));
}

template <typename Content>
Content ThroughService(const Content& content) {
  return std::get<Content>(*Decode(Encode(ServiceMessage(content))));
}

TEST(NcclCodecTest, KeepsWhatTheClientSays) {
  const Hello hello = ThroughClient(Hello{3, 22809, "host", "bus", int64_t{1} << 33});
  EXPECT_EQ(hello.protocol_version, 3u);
  EXPECT_EQ(hello.nccl_version, 22809);
  EXPECT_EQ(hello.host_id, "host");
  EXPECT_EQ(hello.bus_id, "bus");
  EXPECT_EQ(hello.group_bytes, int64_t{1} << 33);
  Join join{9, {}};
  for (int i = 0; i < 128; ++i) join.id.bytes[i] = static_cast<char>(i * 2);
  EXPECT_EQ(ThroughClient(join).generation, 9u);
  EXPECT_EQ(std::memcmp(ThroughClient(join).id.bytes, join.id.bytes, 128), 0);
  const std::string key("\xff\0k", 3);
  const Offer offer = ThroughClient(Offer{key, Direction::kReceive, {0, 5, kMaxBufferBytes}});
  EXPECT_EQ(offer.key, key);
  EXPECT_EQ(offer.direction, Direction::kReceive);
  EXPECT_THAT(offer.lengths, ElementsAre(0, 5, kMaxBufferBytes));
  EXPECT_EQ(ThroughClient(Offer{key, Direction::kSend, {}}).direction, Direction::kSend);
  EXPECT_EQ(ThroughClient(Finished{77}).sequence, 77u);
  EXPECT_EQ(ThroughClient(Broken{"why"}).why, "why");
  EXPECT_EQ(ThroughClient(Withdraw{"key"}).key, "key");
  ThroughClient(Heartbeat{});
}

TEST(NcclCodecTest, KeepsWhatTheServiceSays) {
  const Welcome welcome =
      ThroughService(Welcome{{1, 22809, "host", "bus", 5}, ~uint64_t{3}, absl::Milliseconds(250)});
  EXPECT_EQ(welcome.identity.bus_id, "bus");
  EXPECT_EQ(welcome.pair, ~uint64_t{3});
  EXPECT_EQ(welcome.heartbeat_interval, absl::Milliseconds(250));
  EXPECT_EQ(ThroughService(Connect{4}).generation, 4u);
  const Order order = ThroughService(Order{4, 5, "key"});
  EXPECT_EQ(order.generation, 4u);
  EXPECT_EQ(order.sequence, 5u);
  EXPECT_EQ(order.key, "key");
  const Refused refused = ThroughService(Refused{"key", absl::AlreadyExistsError("twice")});
  EXPECT_EQ(refused.key, "key");
  EXPECT_EQ(refused.why, absl::AlreadyExistsError("twice"));
  EXPECT_EQ(ThroughService(Close{4}).generation, 4u);
  ThroughService(Heartbeat{});
}

TEST(NcclCodecTest, RefusesWhatIsIncomplete) {
  EXPECT_EQ(Decode(v1::AttachRequest()).status(),
            absl::InvalidArgumentError("AttachRequest.message is not set"));
  EXPECT_EQ(Decode(v1::AttachResponse()).status().code(), absl::StatusCode::kInvalidArgument);
  v1::AttachRequest request;
  request.mutable_join()->set_unique_id("short");
  EXPECT_THAT(std::string(Decode(request).status().message()), HasSubstr("5 bytes, 128 are"));
  request.mutable_offer()->set_key("key");
  EXPECT_THAT(std::string(Decode(request).status().message()), HasSubstr("direction is 0"));
  request.mutable_offer()->set_direction(v1::NCCL_DIRECTION_SEND);
  request.mutable_offer()->add_buffer_bytes(~uint64_t{0});
  EXPECT_EQ(std::get<Offer>(*Decode(request)).lengths[0], INT64_MAX);  // out of range, still
  v1::AttachResponse response;
  response.mutable_refused()->set_key("key");
  EXPECT_EQ(std::get<Refused>(*Decode(response)).why.code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace structkv::nccl
