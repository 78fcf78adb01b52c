#include "service/rpc/status_mapping.h"

#include <set>
#include <string>

#include "gtest/gtest.h"

namespace structkv::rpc {
namespace {

constexpr int kFirstError = 1;  // CANCELLED
constexpr int kLastError = 16;  // UNAUTHENTICATED

TEST(StatusMappingTest, EveryErrorGoesBothWaysWithItsText) {
  for (int code = kFirstError; code <= kLastError; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "the text");
    const grpc::Status mapped = ToGrpc(status);
    EXPECT_EQ(static_cast<int>(mapped.error_code()), code) << status;
    EXPECT_EQ(mapped.error_message(), "the text");
    EXPECT_EQ(FromGrpc(mapped), status);
  }
}

TEST(StatusMappingTest, NamesAreThoseOfAbsl) {
  std::set<std::string> names;
  for (int code = 0; code <= kLastError; ++code) {
    const std::string name = CodeName(static_cast<grpc::StatusCode>(code));
    EXPECT_EQ(name, absl::StatusCodeToString(static_cast<absl::StatusCode>(code)));
    names.insert(name);
  }
  EXPECT_EQ(names.size(), kLastError + 1);
  EXPECT_STREQ(CodeName(static_cast<grpc::StatusCode>(99)), "?");
}

TEST(StatusMappingTest, OkHasNoText) {
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
  EXPECT_EQ(ToGrpc(absl::OkStatus()).error_message(), "");
  EXPECT_EQ(FromGrpc(grpc::Status::OK), absl::OkStatus());
}

TEST(StatusMappingTest, LongTextsAreCut) {
  const std::string longest(kMaxErrorTextBytes, 'x');
  EXPECT_EQ(ToGrpc(absl::InternalError(longest)).error_message(), longest);
  EXPECT_EQ(ToGrpc(absl::InternalError(longest + "yyyy")).error_message(), longest + "...");
}

}  // namespace
}  // namespace structkv::rpc
