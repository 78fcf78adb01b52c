#include "service/admin/http_server.h"

#include <memory>
#include <string>
#include <vector>

#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/system/system_error.hpp"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/admin/http_get.h"

namespace structkv::admin {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;
using testkit::HttpAnswer;
using testkit::HttpGet;
using testkit::HttpRaw;

HttpResponse Echo(std::string_view path) {
  if (path == "/none") return {.status = 404, .body = "none\n"};
  return {.body = "path " + std::string(path)};
}

bool HasIpv6() {
  boost::asio::io_context io;
  boost::asio::ip::tcp::acceptor acceptor(io);
  boost::system::error_code error;
  acceptor.open(boost::asio::ip::tcp::v6(), error);
  if (!error) acceptor.bind({boost::asio::ip::make_address("::1"), 0}, error);
  return !error;
}

std::unique_ptr<HttpServer> StartEcho(HttpOptions options = {.address = "127.0.0.1:0"}) {
  auto server = HttpServer::Start(options, Echo);
  EXPECT_TRUE(server.ok()) << server.status();
  return *std::move(server);
}

// ":80".
std::string PortOf(const HttpServer& server) {
  return server.address().substr(server.address().rfind(':'));
}

TEST(HttpServerTest, AnswersGetAndHead) {
  const auto server = StartEcho();
  const HttpAnswer got = HttpGet(server->address(), "/a?b=c");
  EXPECT_EQ(got.status, 200);
  EXPECT_EQ(got.body, "path /a");
  EXPECT_EQ(got.headers.at("Content-Length"), "7");
  EXPECT_EQ(got.headers.at("Cache-Control"), "no-store");
  EXPECT_THAT(got.headers.at("Content-Security-Policy"), HasSubstr("default-src 'none'"));
  const HttpAnswer head = HttpGet(server->address(), "/a", "HEAD");
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.headers.at("Content-Length"), "7");
  EXPECT_EQ(head.body, "");
  EXPECT_EQ(HttpGet(server->address(), "/none").status, 404);
}

TEST(HttpServerTest, RefusesEverythingElse) {
  const auto server = StartEcho();
  const HttpAnswer deleted = HttpGet(server->address(), "/a", "DELETE");
  EXPECT_EQ(deleted.status, 405);
  EXPECT_EQ(deleted.headers.at("Allow"), "GET, HEAD");
  EXPECT_THAT(HttpRaw(server->address(), "POST /a HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"),
              StartsWith("HTTP/1.1 413"));
  EXPECT_THAT(HttpRaw(server->address(), "\x16\x03\x01 this is TLS\r\n\r\n"),
              StartsWith("HTTP/1.1 400"));
  EXPECT_THAT(
      HttpRaw(server->address(), "GET / HTTP/1.1\r\nX: " + std::string(9 << 10, 'x') + "\r\n\r\n"),
      StartsWith("HTTP/1.1 431"));
  EXPECT_EQ(HttpGet(server->address(), "/a").status, 200);
}

TEST(HttpServerTest, ConnectionsAreKept) {
  const auto server = StartEcho();
  const std::string both = HttpRaw(server->address(),
                                   "GET /a HTTP/1.1\r\n\r\n"
                                   "GET /b HTTP/1.1\r\nConnection: close\r\n\r\n");
  EXPECT_THAT(both, AllOf(HasSubstr("path /a"), HasSubstr("path /b")));
  EXPECT_THAT(HttpRaw(server->address(), "GET /a HTTP/1.0\r\n\r\n"), HasSubstr("path /a"));
}

TEST(HttpServerTest, WhoSendsNothingIsCutOff) {
  const auto server = StartEcho({.address = "127.0.0.1:0", .limit = absl::Milliseconds(300)});
  EXPECT_EQ(HttpRaw(server->address(), "GET /a HT"), "");  // returns
}

TEST(HttpServerTest, ConnectionsAreBounded) {
  const auto server = StartEcho({.address = "127.0.0.1:0", .max_connections = 2});
  boost::asio::io_context io;
  const auto endpoint = [&] {
    const std::string& address = server->address();
    return boost::asio::ip::tcp::endpoint(
        boost::asio::ip::make_address("127.0.0.1"),
        static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
  }();
  std::vector<boost::asio::ip::tcp::socket> idle;
  for (int i = 0; i < 2; ++i) idle.emplace_back(io).connect(endpoint);
  // A third one is served, and the first, which has waited longest, makes room.
  EXPECT_EQ(HttpGet(server->address(), "/a").body, "path /a");
  char byte = 0;
  boost::system::error_code error;
  idle[0].read_some(boost::asio::buffer(&byte, 1), error);
  EXPECT_TRUE(error);
  EXPECT_EQ(HttpGet(server->address(), "/b").body, "path /b");
}

TEST(HttpServerTest, EndsWithConnectionsOpen) {
  auto server = StartEcho();
  boost::asio::io_context io;
  boost::asio::ip::tcp::socket socket(io);
  const std::string address = server->address();
  socket.connect({boost::asio::ip::make_address("127.0.0.1"),
                  static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1)))});
  server.reset();
  char byte = 0;
  boost::system::error_code error;
  socket.read_some(boost::asio::buffer(&byte, 1), error);
  EXPECT_TRUE(error);
}

TEST(HttpServerTest, Addresses) {
  // A machine may have no IPv6.
  if (const auto six = HttpServer::Start({.address = "[::1]:0"}, Echo); six.ok()) {
    EXPECT_THAT((*six)->address(), AllOf(StartsWith("[::1]:"), Not(HasSubstr(":0"))));
  }
  EXPECT_THAT(StartEcho({.address = "localhost:0"})->address(), StartsWith("localhost:"));
  const auto server = StartEcho();
  EXPECT_EQ(
      HttpServer::Start({.address = server->address()}, Echo).status(),
      absl::UnavailableError("cannot listen on " + server->address() + ": Address already in use"));
  for (const char* bad : {"", "7412", "host:80", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1",
                          "unix:/tmp/socket", "[::1:80"}) {
    const absl::Status status = HttpServer::Start({.address = bad}, Echo).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("'" + std::string(bad) + "' is no address to listen on"));
  }
}

// As gRPC's addresses: a pod of IPv6 alone would never be ready otherwise.
TEST(HttpServerTest, AWildcardIsBothFamilies) {
  for (const char* address : {"0.0.0.0:0", "[::]:0"}) {
    const auto server = StartEcho({.address = address});
    EXPECT_EQ(HttpGet("127.0.0.1" + PortOf(*server), "/a").body, "path /a") << address;
    // It is taken, for either family.
    EXPECT_FALSE(HttpServer::Start({.address = "0.0.0.0" + PortOf(*server)}, Echo).ok());
    if (!HasIpv6()) continue;
    EXPECT_EQ(HttpGet("[::1]" + PortOf(*server), "/a").body, "path /a") << address;
  }
  if (!HasIpv6()) GTEST_SKIP() << "this machine has no IPv6: the other family alone was asked";
}

TEST(HttpServerTest, AnAddressIsOfItsFamilyAlone) {
  if (!HasIpv6()) GTEST_SKIP() << "this machine has no IPv6";
  const auto server = StartEcho({.address = "[::1]:0"});
  EXPECT_EQ(HttpGet(server->address(), "/a").body, "path /a");
  EXPECT_THROW(HttpGet("127.0.0.1" + PortOf(*server), "/a"), boost::system::system_error);
  const auto mapped = StartEcho({.address = "[::ffff:127.0.0.1]:0"});
  EXPECT_EQ(HttpGet("127.0.0.1" + PortOf(*mapped), "/a").body, "path /a");
}

}  // namespace
}  // namespace structkv::admin
