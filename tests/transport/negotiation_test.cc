// Which of a prompt's wishes is granted, and what is said of the others.
#include "service/transport/negotiation.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace structkv::transport {
namespace {

using ::testing::HasSubstr;

Grant Says(absl::Status status) {
  return [status](const TransportRequest&,
                  const PromptSizes&) -> absl::StatusOr<std::shared_ptr<Transport>> {
    if (!status.ok()) return status;
    return InlineTransport();
  };
}

TEST(NegotiateTest, NoWishIsInline) {
  const auto granted = Negotiate({}, {}, {});
  ASSERT_TRUE(granted.ok());
  EXPECT_EQ(granted->transport->kind(), Kind::kInline);
  EXPECT_FALSE(granted->transport->in_place());
  EXPECT_EQ(granted->reason, "");
}

TEST(NegotiateTest, TheFirstThatCanBeHadIsGranted) {
  const Offers offers = {{Kind::kSharedMemory, Says(absl::FailedPreconditionError("no regions"))}};
  const auto granted = Negotiate(
      {.wishes = {Kind::kNccl, Kind::kSharedMemory, Kind::kInline, Kind::kCudaIpc}}, {}, offers);
  ASSERT_TRUE(granted.ok());
  EXPECT_EQ(granted->transport->kind(), Kind::kInline);
  EXPECT_EQ(granted->reason, "nccl: this server does not have it; shared_memory: no regions");
}

TEST(NegotiateTest, NoneThatCanBeHadIsAnErrorWithAllReasons) {
  const auto granted =
      Negotiate({.wishes = {Kind::kCudaIpc, Kind::kSharedMemory}}, {},
                {{Kind::kSharedMemory, Says(absl::FailedPreconditionError("no regions"))}});
  EXPECT_TRUE(absl::IsFailedPrecondition(granted.status()));
  EXPECT_THAT(std::string(granted.status().message()),
              HasSubstr("cuda_ipc: this server does not have it; shared_memory: no regions"));
}

TEST(NegotiateTest, AFaultOfThePromptIsNoReasonToTryTheNext) {
  const auto granted =
      Negotiate({.wishes = {Kind::kSharedMemory, Kind::kInline}}, {},
                {{Kind::kSharedMemory, Says(absl::NotFoundError("open.regions[0]"))}});
  EXPECT_TRUE(absl::IsNotFound(granted.status()));
}

TEST(NegotiateTest, InlineTakesNoRanges) {
  const absl::Status status = InlineTransport()->Resolve({0, 0, 1}).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("transport is inline"));
}

}  // namespace
}  // namespace structkv::transport
