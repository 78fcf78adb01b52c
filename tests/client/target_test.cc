#include "client/cpp/target.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"

namespace structkv::client::internal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(TargetTest, OneServerIsLeftToGrpc) {
  for (const char* target :
       {"localhost:7411", "unix:/run/structkv", "ipv4:127.0.0.1:1", "dns://10.0.0.1/name:1"}) {
    const auto parsed = ParseTarget(target);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_THAT(parsed->fixed, ElementsAre(target));
    EXPECT_FALSE(parsed->several());
  }
}

TEST(TargetTest, ListsAndNamesStandForSeveral) {
  const auto list = ParseTarget("10.0.0.1:1, unix:/a,[::1]:2,10.0.0.1:1");
  ASSERT_TRUE(list.ok()) << list.status();
  EXPECT_THAT(list->fixed, ElementsAre("10.0.0.1:1", "unix:/a", "[::1]:2"));
  EXPECT_THAT(list->names, IsEmpty());
  EXPECT_TRUE(list->several());
  const auto name = ParseTarget("dns:///structkv.prefill:7411");
  ASSERT_TRUE(name.ok()) << name.status();
  EXPECT_THAT(name->names, ElementsAre("structkv.prefill:7411"));
  EXPECT_TRUE(name->several());
}

TEST(TargetTest, AddressesAreToldFromNames) {
  for (const char* address : {"10.0.0.1:1", "[::1]:2"}) EXPECT_TRUE(IsIpAddress(address));
  for (const char* other : {"localhost:1", "10.0.0.1", "10.0.0:1", "unix:/run/structkv", ""}) {
    EXPECT_FALSE(IsIpAddress(other)) << other;
  }
  EXPECT_EQ(HostOf("structkv.prefill:7411"), "structkv.prefill");
}

TEST(TargetTest, WhatIsNoAddressIsRefused) {
  for (const char* target : {"", "a:1,", ",a:1", "a:1,,b:1"}) {
    EXPECT_THAT(ParseTarget(target).status().message(), HasSubstr("empty")) << target;
  }
  for (const char* target : {"dns:///name", "dns:///:1", "dns:///name:"}) {
    EXPECT_THAT(ParseTarget(target).status().message(), HasSubstr("has no port")) << target;
  }
}

TEST(TargetTest, NamesAreLookedUp) {
  const auto numeric = LookUp("127.0.0.7:99");
  ASSERT_TRUE(numeric.ok()) << numeric.status();
  ASSERT_EQ(numeric->size(), 1U);
  EXPECT_EQ((*numeric)[0].address, "127.0.0.7:99");
  const auto bracketed = LookUp("[::1]:99");
  ASSERT_TRUE(bracketed.ok()) << bracketed.status();
  EXPECT_EQ((*bracketed)[0].address, "[::1]:99");
  const auto local = LookUp("localhost:99");
  ASSERT_TRUE(local.ok()) << local.status();
  EXPECT_EQ((*local)[0].name, "localhost");
  const auto nothing = LookUp("no-such-name.invalid:99");
  EXPECT_TRUE(absl::IsUnavailable(nothing.status()));
  EXPECT_THAT(nothing.status().message(), HasSubstr("no-such-name.invalid has no address"));
}

// A token that could be read on its way to any of them is refused before there is a connection.
TEST(TargetTest, TokensAreForPrivateAddressesAlone) {
  ClientOptions options;
  options.token = "secret";
  EXPECT_TRUE(Client::Connect("127.0.0.1:1,unix:/a", options).ok());
  EXPECT_TRUE(Client::Connect("dns:///localhost:1", options).ok());
  for (const char* target : {"127.0.0.1:1,10.0.0.1:1", "dns:///structkv:7411"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(Client::Connect(target, options).status())) << target;
  }
}

}  // namespace
}  // namespace structkv::client::internal
