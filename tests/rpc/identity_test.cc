#include "service/rpc/identity.h"

#include <fstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/process.h"

namespace structkv::rpc {
namespace {

TEST(PatternTest, Fits) {
  for (const auto& [pattern, text] : {
           std::pair("", ""),
           {"a", "a"},
           {"*", ""},
           {"*", "anything"},
           {"spiffe://cluster/ns/*/sa/prefill", "spiffe://cluster/ns/llm/sa/prefill"},
           {"*.example", "a.b.example"},
           {"a*b*c", "axxbxbxxc"},
           {"**a", "a"},
       }) {
    EXPECT_TRUE(FitsPattern(pattern, text)) << pattern << " " << text;
  }
  for (const auto& [pattern, text] : {
           std::pair("", "a"),
           {"a", ""},
           {"a", "ab"},
           {"*.example", "example"},
           {"*.example", "a.example.org"},
           {"a*b*c", "axxc"},
           {"spiffe://cluster/*", "xspiffe://cluster/a"},
       }) {
    EXPECT_FALSE(FitsPattern(pattern, text)) << pattern << " " << text;
  }
}

class TokenFileTest : public ::testing::Test {
 protected:
  absl::Status Open(const std::string& text) {
    const std::string path = directory_.Path("tokens");
    std::ofstream(path) << text;
    return Identity::Open({.certificate_names = {}, .token_file = path, .warn = nullptr}).status();
  }
  void ExpectRefused(const std::string& text, const std::string& why) {
    const absl::Status status = Open(text);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), "token-file " + directory_.Path("tokens") + ", line " + why);
  }

  testkit::TemporaryDirectory directory_;
};

TEST_F(TokenFileTest, WhatIsTaken) {
  EXPECT_EQ(Open("# a comment\n\nprefill 0123456789abcdef\n decode\t0123456789abcdeF \n"
                 "prefill 0123456789abcdef2"),
            absl::OkStatus());
}

TEST_F(TokenFileTest, WhatIsRefused) {
  EXPECT_EQ(Open("# none\n"), absl::InvalidArgumentError("token-file " + directory_.Path("tokens") +
                                                         " holds no token"));
  ExpectRefused("one", "1: 1 words; a tenant and its token are expected");
  ExpectRefused("\na b c", "2: 3 words; a tenant and its token are expected");
  ExpectRefused("a 0123456789abcde", "1: the token has 15 bytes; at least 16 are needed");
  ExpectRefused(std::string(129, 'a') + " 0123456789abcdef",
                "1: the tenant has 129 bytes; at most 128 are allowed");
  ExpectRefused("a 0123456789abcdef\nb 0123456789abcdef\n", "2: the token came before");
  EXPECT_EQ(
      Identity::Open({.certificate_names = {}, .token_file = "/nowhere", .warn = nullptr}).status(),
      absl::NotFoundError("token-file /nowhere cannot be read"));
}

TEST(LocalTenantTest, OfSocketsOfThisHost) {
  EXPECT_EQ(Identity::LocalTenant(""), "name:");
  EXPECT_EQ(Identity::LocalTenant("a"), "name:a");
  EXPECT_EQ(Identity::LocalTenant("name:a"), "name:a");
  EXPECT_EQ(Identity::LocalTenant("peer:spiffe://a"), "peer:spiffe://a");
  EXPECT_EQ(Identity::LocalTenant("token:a"), "token:a");
}

}  // namespace
}  // namespace structkv::rpc
