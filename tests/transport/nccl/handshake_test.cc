#include "service/transport/nccl/handshake.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace structkv::nccl {
namespace {

Identity Own() { return {kProtocolVersion, 22809, "host-a", "0000:17:00.0", 1 << 20}; }

Identity Peer() {
  Identity peer = Own();
  peer.host_id = "host-b";
  return peer;
}

absl::Status CheckWith(void (*change)(Identity&)) {
  Identity peer = Peer();
  change(peer);
  return CheckPeer(Own(), peer);
}

TEST(HandshakeTest, TakesAnotherHostOrAnotherGpu) {
  EXPECT_EQ(CheckPeer(Own(), Peer()), absl::OkStatus());
  EXPECT_EQ(CheckWith([](Identity& peer) {
              peer.host_id = "host-a";
              peer.bus_id = "0000:65:00.0";
            }),
            absl::OkStatus());
}

TEST(HandshakeTest, NamesWhatDiffers) {
  EXPECT_EQ(CheckWith([](Identity& peer) { peer.protocol_version = 2; }),
            absl::FailedPreconditionError("protocol_version is 2, 1 is needed"));
  EXPECT_EQ(CheckWith([](Identity& peer) { peer.nccl_version = 22703; }),
            absl::FailedPreconditionError("nccl_version is 2.27.3, the other end has 2.28.9; both "
                                          "must have the same NCCL"));
  EXPECT_EQ(CheckWith([](Identity& peer) { peer.group_bytes = 7; }),
            absl::FailedPreconditionError("group_bytes is 7, the other end has 1048576; both must "
                                          "cut transfers alike"));
  EXPECT_EQ(CheckWith([](Identity& peer) { peer.host_id = "host-a"; }).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(CheckWith([](Identity& peer) { peer.bus_id = ""; }),
            absl::InvalidArgumentError("bus_id has 0 bytes, 1 to 128 are allowed"));
  EXPECT_EQ(CheckWith([](Identity& peer) { peer.host_id = std::string(129, 'h'); }),
            absl::InvalidArgumentError("host_id has 129 bytes, 1 to 128 are allowed"));
}

TEST(HandshakeTest, NamesThisHost) {
  EXPECT_THAT(HostId(), ::testing::SizeIs(36));
  EXPECT_EQ(HostId(), HostId());
}

TEST(HandshakeTest, TakesIdsOfNcclsLengthAlone) {
  const std::string bytes(128, 'i');
  const absl::StatusOr<UniqueId> id = ParseUniqueId(bytes);
  ASSERT_TRUE(id.ok());
  EXPECT_EQ(std::string(id->bytes, 128), bytes);
  EXPECT_EQ(ParseUniqueId(bytes.substr(1)).status(),
            absl::InvalidArgumentError("unique_id has 127 bytes, 128 are needed"));
}

}  // namespace
}  // namespace structkv::nccl
