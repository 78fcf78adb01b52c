#include "service/rpc/peer_streams.h"

#include <netinet/in.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/rpc/open_streams.h"

namespace structkv::rpc {
namespace {

using ::testing::HasSubstr;

std::vector<PeerStreams::Place> Fill(const PeerStreams& streams, const std::string& peer,
                                     int count) {
  std::vector<PeerStreams::Place> places;
  for (int i = 0; i < count; ++i) {
    absl::StatusOr<PeerStreams::Place> place = streams.Take(peer);
    EXPECT_TRUE(place.ok()) << i << ": " << place.status();
    if (place.ok()) places.push_back(*std::move(place));
  }
  return places;
}

TEST(PeerStreamsTest, EachPeerHasItsOwnLimit) {
  const PeerStreams streams(3);
  const auto one = Fill(streams, "ipv4:10.0.0.1:7000", 3);
  const auto same_host = Fill(streams, "ipv4:10.0.0.1:7001", 3);
  const absl::Status refused = streams.Take("ipv4:10.0.0.1:7000").status();
  EXPECT_EQ(refused, absl::ResourceExhaustedError("the connection has 3 streams; 3 are allowed "
                                                  "(max-streams-per-peer)"));
  EXPECT_EQ(streams.refused().connection, 1);
  EXPECT_EQ(streams.refused().unix_sockets, 0);
}

TEST(PeerStreamsTest, APlaceIsGivenBackOnce) {
  const PeerStreams streams(2);
  auto places = Fill(streams, "ipv6:%5B::1%5D:7000", 2);
  const PeerStreams::Place copy = places[0];
  places[0].reset();
  EXPECT_FALSE(streams.Take("ipv6:%5B::1%5D:7000").ok()) << "the copy has it";
  places[1].reset();
  places[1] = Fill(streams, "ipv6:%5B::1%5D:7000", 1)[0];
  EXPECT_FALSE(streams.Take("ipv6:%5B::1%5D:7000").ok());
}

TEST(PeerStreamsTest, UnixSocketsShareALimitOfManyConnections) {
  const PeerStreams streams(2);
  const auto unnamed = Fill(streams, "unix:", kUnixConnections);
  const auto named = Fill(streams, "unix:/tmp/client", kUnixConnections - 1);
  const auto last = Fill(streams, "unix-abstract:client", 1);
  const absl::Status refused = streams.Take("unix:").status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()), HasSubstr(absl::StrCat(2 * kUnixConnections)));
  EXPECT_EQ(streams.refused().unix_sockets, 1);
  EXPECT_TRUE(streams.Take("ipv4:10.0.0.1:7000").ok());
}

TEST(PeerStreamsTest, WithoutALimitAllCome) { Fill(PeerStreams(0), "ipv4:10.0.0.1:7000", 10'000); }

TEST(PeerStreamsTest, PlacesMayOutliveTheCount) {
  auto streams = std::make_unique<PeerStreams>(1);
  const auto places = Fill(*streams, "ipv4:10.0.0.1:7000", 1);
  streams.reset();
}

// e2e tests hold these names to those that gRPC gives.
TEST(PeerNameTest, IsWhatGrpcCallsThem) {
  sockaddr_storage address = {};
  EXPECT_EQ(PeerName(address), "");
  auto& v4 = reinterpret_cast<sockaddr_in&>(address);
  v4.sin_family = AF_INET;
  v4.sin_port = htons(7000);
  v4.sin_addr.s_addr = htonl(0x0a000102);
  EXPECT_EQ(PeerName(address), "ipv4:10.0.1.2:7000");
  address = {};
  auto& v6 = reinterpret_cast<sockaddr_in6&>(address);
  v6.sin6_family = AF_INET6;
  v6.sin6_port = htons(7000);
  v6.sin6_addr = in6addr_loopback;
  EXPECT_EQ(PeerName(address), "ipv6:%5B::1%5D:7000");
  v6.sin6_scope_id = 3;
  EXPECT_EQ(PeerName(address), "ipv6:%5B::1%253%5D:7000");
  v6.sin6_scope_id = 0;
  const uint8_t mapped[] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 1, 2};
  std::copy(std::begin(mapped), std::end(mapped), v6.sin6_addr.s6_addr);
  EXPECT_EQ(PeerName(address), "ipv4:10.0.1.2:7000");
}

}  // namespace
}  // namespace structkv::rpc
