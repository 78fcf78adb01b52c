// What a listener does where it cannot have all that an address stands for.
#include "service/rpc/connection_listener.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace structkv::rpc {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<std::unique_ptr<ConnectionListener>> BindTo(const std::string& address) {
  std::vector<ConnectionListener::Place> places;
  places.push_back({address, nullptr});
  return ConnectionListener::Bind(
      std::move(places), {.connections = 8, .streams = 0, .ack = absl::Seconds(1)}, nullptr);
}

TEST(ConnectionListenerTest, APortThatIsTakenIsAnError) {
  const auto first = BindTo("127.0.0.1:0");
  ASSERT_TRUE(first.ok()) << first.status();
  const std::string address = absl::StrCat("127.0.0.1:", (*first)->ports().front());
  const absl::Status second = BindTo(address).status();
  EXPECT_EQ(second.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.message()), HasSubstr(address));
}

// There is IPv4 alone left: half of what is asked for.
TEST(ConnectionListenerTest, APortThatIsTakenInOneFamilyIsAnError) {
  const int taken = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  sockaddr_in6 at = {};
  at.sin6_family = AF_INET6;
  socklen_t size = sizeof(at);
  auto* const address = reinterpret_cast<sockaddr*>(&at);
  if (taken < 0 || setsockopt(taken, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on)) != 0 ||
      bind(taken, address, size) != 0) {
    if (taken >= 0) close(taken);
    GTEST_SKIP() << "there is no IPv6 here";
  }
  ASSERT_EQ(listen(taken, 1), 0);
  ASSERT_EQ(getsockname(taken, address, &size), 0);
  for (const char* host : {"[::]", "0.0.0.0"}) {
    EXPECT_EQ(BindTo(absl::StrCat(host, ":", ntohs(at.sin6_port))).status().code(),
              absl::StatusCode::kUnavailable)
        << host;
  }
  close(taken);
}

TEST(ConnectionListenerTest, AWildcardHasOnePort) {
  const auto listener = BindTo("0.0.0.0:0");
  ASSERT_TRUE(listener.ok()) << listener.status();
  ASSERT_EQ((*listener)->ports().size(), 1U);
  EXPECT_GT((*listener)->ports().front(), 0);
}

}  // namespace
}  // namespace structkv::rpc
