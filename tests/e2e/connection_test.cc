// Peers that take what every peer is given: connections, handshakes, streams, headers, pings.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/certificates.h"
#include "tests/testing/health.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// A TCP connection that speaks only as it is told.
class Peer {
 public:
  explicit Peer(int port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  }
  ~Peer() { close(fd_); }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  // False where the server has closed.
  bool Send(const std::string& bytes) const {
    return send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL) ==
           static_cast<ssize_t>(bytes.size());
  }
  // Whether anything comes within the limit.
  bool Hears(milliseconds limit) const {
    pollfd wait = {fd_, POLLIN, 0};
    char byte = 0;
    return poll(&wait, 1, static_cast<int>(limit.count())) > 0 && recv(fd_, &byte, 1, MSG_PEEK) > 0;
  }
  // Whether the server says GOAWAY within the limit.
  bool IsSentAway(milliseconds limit) const {
    const auto end = std::chrono::steady_clock::now() + limit;
    std::string received;
    while (true) {
      const auto byte = [&](size_t at) { return static_cast<unsigned char>(received[at]); };
      while (received.size() >= 9) {
        const size_t length = byte(0) << 16 | byte(1) << 8 | byte(2);
        if (received[3] == 7) return true;
        if (received.size() < 9 + length) break;
        received.erase(0, 9 + length);
      }
      const std::optional<std::string> more = Receive(end);
      if (!more.has_value() || more->empty()) return false;
      received += *more;
    }
  }
  // Whether the server says `text` somewhere within the limit.
  bool IsTold(const std::string& text, milliseconds limit) const {
    const auto end = std::chrono::steady_clock::now() + limit;
    std::string received;
    while (received.find(text) == std::string::npos) {
      const std::optional<std::string> more = Receive(end);
      if (!more.has_value() || more->empty()) return false;
      received += *more;
    }
    return true;
  }
  // Whether the server closes within the limit; what it says before is dropped.
  bool IsClosed(milliseconds limit) const {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (true) {
      const std::optional<std::string> more = Receive(end);
      if (!more.has_value()) return false;
      if (more->empty()) return true;
    }
  }

 private:
  // What comes next; empty: the server has closed. nullopt: nothing comes until `end`.
  std::optional<std::string> Receive(std::chrono::steady_clock::time_point end) const {
    const auto left =
        std::chrono::duration_cast<milliseconds>(end - std::chrono::steady_clock::now());
    pollfd wait = {fd_, POLLIN, 0};
    if (left.count() < 0 || poll(&wait, 1, static_cast<int>(left.count())) <= 0) {
      return std::nullopt;
    }
    char buffer[4096];
    const ssize_t count = recv(fd_, buffer, sizeof(buffer), 0);
    return std::string(buffer, static_cast<size_t>(std::max<ssize_t>(count, 0)));
  }

  const int fd_;
};

std::string Frame(char type, char flags, uint32_t stream, const std::string& payload) {
  const auto size = static_cast<uint32_t>(payload.size());
  std::string frame = {static_cast<char>(size >> 16), static_cast<char>(size >> 8),
                       static_cast<char>(size), type, flags};
  for (int shift = 24; shift >= 0; shift -= 8) frame += static_cast<char>(stream >> shift);
  return frame + payload;
}

// HEADERS of a call, without its request: ":method POST, :scheme http, :path" and what gRPC asks
// for.
std::string CallHeaders(const std::string& path) {
  std::string headers = "\x83\x86";
  const auto literal = [&headers](const std::string& name, const std::string& value) {
    headers += '\0';
    headers += static_cast<char>(name.size()) + name + static_cast<char>(value.size()) + value;
  };
  literal(":path", path);
  literal(":authority", "localhost");
  literal("content-type", "application/grpc");
  literal("te", "trailers");
  return headers;
}

constexpr char kCompress[] = "/structkv.v1.Compression/Compress";
constexpr char kFetchCache[] = "/structkv.v1.HeldCaches/FetchCache";
constexpr char kGetLoad[] = "/structkv.v1.Compression/GetLoad";

// The preface and an empty SETTINGS.
std::string Greeting() { return "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + Frame(4, 0, 0, ""); }

class ConnectionTest : public ServiceTest {
 protected:
  // 4 streams of a connection, 6 of a peer that does not heed that.
  void StartWithFewStreams() {
    ServerOptions options = TestOptions();
    options.max_streams_per_connection = 4;
    options.max_streams_per_peer = 6;
    Start(options);
  }
};

TEST_F(ConnectionTest, ThereAreNoMoreThanAllowed) {
  ServerOptions options = TestOptions();
  options.max_connections = 8;
  Start(options);  // its channels have two or three
  std::vector<std::unique_ptr<Peer>> peers;
  for (int i = 0; i < 40; ++i) peers.push_back(std::make_unique<Peer>(server().port()));
  EXPECT_TRUE(Eventually([&] { return server().connections_refused() >= 32; }));
  EXPECT_LE(server().connections(), 8);
  EXPECT_TRUE(Eventually([&] {
    return std::count_if(peers.begin(), peers.end(),
                         [](const auto& peer) { return peer->IsClosed(milliseconds(1)); }) >= 32;
  }));
  ExpectUndisturbed();  // who is in is served on
  peers.clear();
  EXPECT_TRUE(Eventually([&] { return Health(NewChannel(target())) == "SERVING"; }));
  EXPECT_TRUE(Eventually([&] { return server().connections() <= 4; }));
}

TEST_F(ConnectionTest, ASlowHandshakeIsClosed) {
  ServerOptions options = TestOptions();
  options.handshake_limit = absl::Seconds(2);
  StartAlone(options);
  const Peer silent(server().port());
  const Peer slow(server().port());
  EXPECT_TRUE(slow.Send("PRI * HTTP/2.0"));
  EXPECT_TRUE(silent.IsClosed(seconds(10)));
  EXPECT_TRUE(slow.IsClosed(seconds(10)));
  EXPECT_EQ(Health(channel()), "SERVING");
}

TEST_F(ConnectionTest, ASlowTlsHandshakeIsClosed) {
  const Authority authority;
  const TemporaryDirectory directory;
  const Authority::Pair pair = authority.Sign({"IP:127.0.0.1"});
  ServerOptions options = TestOptions();
  options.handshake_limit = absl::Seconds(2);
  options.tls.certificate = directory.Path("certificate");
  options.tls.key = directory.Path("key");
  std::ofstream(options.tls.certificate) << pair.certificate;
  std::ofstream(options.tls.key) << pair.key;
  StartAlone(options);
  const Peer silent(server().port());
  const Peer slow(server().port());
  EXPECT_TRUE(slow.Send(std::string("\x16\x03\x01\x02", 4)));  // a ClientHello's first bytes
  EXPECT_TRUE(silent.IsClosed(seconds(10)));
  EXPECT_TRUE(slow.IsClosed(seconds(10)));
  EXPECT_EQ(Health(NewTlsChannel(target(), authority.certificate())), "SERVING");
}

TEST_F(ConnectionTest, StreamsBeyondTheLimitWait) {
  ServerOptions options = TestOptions();
  options.max_streams_per_connection = 3;
  StartAlone(options);
  const PromptData data(SmallOpen(), 1);
  std::vector<std::unique_ptr<Call>> calls;
  for (int i = 0; i < 3; ++i) {
    calls.push_back(std::make_unique<Call>(channel()));
    calls.back()->Send(OpenMessage(data.open()));
    ASSERT_TRUE(calls.back()->WaitForOpened().has_value());
  }
  const CallOptions impatient = {.deadline = milliseconds(300)};
  ExpectFailure(Run(AllMessages(data), impatient), grpc::StatusCode::DEADLINE_EXCEEDED, {});
  EXPECT_EQ(server().active_streams(), 3);
  EXPECT_EQ(server().connections_broken(), 0);
  ExpectSuccess(data, testkit::Run(NewChannel(target()), AllMessages(data)));
  for (auto& call : calls) {
    call->Cancel();
    call->Finish();
  }
  ExpectNothingHeld();
}

// The server holds no more of a flood than its limit of streams, and closes or refuses the rest.
// gRPC 1.51 holds peers to the limit once they have acknowledged it.
TEST_F(ConnectionTest, AFloodOfStreamsTakesNoSessions) {
  ServerOptions options = TestOptions();
  options.max_streams_per_connection = 4;
  Start(options);
  auto peer = std::make_unique<Peer>(server().port());
  ASSERT_TRUE(peer->Send(Greeting()));
  ASSERT_TRUE(peer->Hears(seconds(10)));  // the server's SETTINGS, which come first
  ASSERT_TRUE(peer->Send(Frame(4, 1, 0, "")));
  const std::string headers = CallHeaders(kCompress);
  for (uint32_t i = 0; i < 500; ++i) {
    if (!peer->Send(Frame(1, 4, 2 * i + 1, headers))) break;
  }
  EXPECT_LE(server().active_streams(), 5);  // with the neighbour's
  peer.reset();
  ExpectUndisturbed();
}

// Whoever never acknowledges the limit meets the server's own.
TEST_F(ConnectionTest, AFloodWithoutAnAcknowledgementIsRefusedByTheStream) {
  StartWithFewStreams();
  auto peer = std::make_unique<Peer>(server().port());
  ASSERT_TRUE(peer->Send(Greeting()));
  const std::string headers = CallHeaders(kCompress);
  // Not so many that the connection is broken for them.
  for (uint32_t i = 0; i < 24; ++i) ASSERT_TRUE(peer->Send(Frame(1, 4, 2 * i + 1, headers)));
  // All but six, whose requests are waited for.
  EXPECT_TRUE(Eventually([&] { return server().streams_refused().connection == 18; }))
      << server().streams_refused().connection;
  EXPECT_EQ(server().active_streams(), 7);  // with the neighbour's
  EXPECT_EQ(server().streams_refused().unix_sockets, 0);
  // Unless the connection was broken before, for those that were not yet told.
  EXPECT_TRUE(peer->IsTold("the connection has 6 streams; 6 are allowed (max-streams-per-peer)",
                           seconds(10)));
  const PromptData data(SmallOpen(), 1);
  ExpectSuccess(data, Run(AllMessages(data)));  // on another connection of the same host
  peer.reset();
  ExpectUndisturbed();
}

// Nor do streams escape whose requests never come, which no service is told of.
TEST_F(ConnectionTest, AFloodOfCallsWithoutRequestsBreaksItsConnection) {
  StartWithFewStreams();
  int64_t broken = 0;
  for (const char* path : {kFetchCache, kGetLoad, "/grpc.health.v1.Health/Check"}) {
    const Peer peer(server().port());
    const Peer modest(server().port());
    ASSERT_TRUE(peer.Send(Greeting()));
    ASSERT_TRUE(modest.Send(Greeting()));
    const std::string headers = CallHeaders(path);
    for (uint32_t i = 0; i < 500; ++i) {
      if (!peer.Send(Frame(1, 4, 2 * i + 1, headers))) break;
      if (i < 6) {
        ASSERT_TRUE(modest.Send(Frame(1, 4, 2 * i + 1, headers)));
      }
    }
    EXPECT_TRUE(peer.IsClosed(seconds(10))) << path;
    EXPECT_EQ(server().connections_broken(), ++broken) << path;
    EXPECT_FALSE(modest.IsClosed(milliseconds(300))) << path;  // some looks later
  }
  EXPECT_EQ(server().connections_broken(), broken);
  ExpectUndisturbed();
}

// The connections of a host's unix sockets share a limit, since gRPC has one name for all of them.
TEST_F(ConnectionTest, StreamsOfUnixSocketsAreCountedTogether) {
  const TemporaryDirectory directory;
  ServerOptions options = TestOptions();
  options.max_streams_per_connection = 1;
  options.max_streams_per_peer = 1;
  const std::string address = "unix:" + directory.Path("socket");
  options.listen.push_back(address);
  StartAlone(options);
  const PromptData data(SmallOpen(), 1);
  std::vector<std::unique_ptr<Call>> calls;
  for (int i = 0; i < 16; ++i) {
    calls.push_back(std::make_unique<Call>(NewChannel(address)));
    calls.back()->Send(OpenMessage(data.open()));
    ASSERT_TRUE(calls.back()->WaitForOpened().has_value()) << i;
  }
  ExpectFailure(
      testkit::Run(NewChannel(address), AllMessages(data)), grpc::StatusCode::RESOURCE_EXHAUSTED,
      {"the connections to unix sockets have 16 streams", "16 times max-streams-per-peer"});
  EXPECT_EQ(server().streams_refused().unix_sockets, 1);
  ExpectSuccess(data, Run(AllMessages(data)));  // over TCP
  calls.back()->Cancel();
  calls.back()->Finish();
  calls.pop_back();
  EXPECT_TRUE(Eventually([&] { return server().active_streams() == 15; }));
  ExpectSuccess(data, testkit::Run(NewChannel(address), AllMessages(data)));
  for (auto& call : calls) {
    call->Cancel();
    call->Finish();
  }
  calls.clear();
  ExpectNothingHeld();
}

// gRPC 1.51 also closes the connection: who still writes may learn of that alone.
TEST_F(ConnectionTest, LongMetadataIsRefused) {
  Start();
  CallOptions options;
  options.metadata = {{"x-long", std::string(20'000, 'a')}};
  const Outcome silent = Call(channel(), options).Finish();
  EXPECT_EQ(silent.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED)
      << silent.status.error_message();
  const Outcome writing = Run(AllMessages(PromptData(SmallOpen(), 1)), options);
  EXPECT_THAT(writing.status.error_code(),
              ::testing::AnyOf(grpc::StatusCode::RESOURCE_EXHAUSTED, grpc::StatusCode::UNAVAILABLE))
      << writing.status.error_message();
  EXPECT_TRUE(writing.responses.empty());
  ExpectUndisturbed();
}

// Pings without an end: HTTP/2's GOAWAY (ENHANCE_YOUR_CALM), and the connection is closed.
TEST_F(ConnectionTest, PingsThatComeTooOftenEndTheConnection) {
  Start();
  const Peer peer(server().port());
  ASSERT_TRUE(peer.Send(Greeting()));
  for (int i = 0; i < 100; ++i) {
    if (!peer.Send(Frame(6, 0, 0, std::string(8, 'p')))) break;
  }
  EXPECT_TRUE(peer.IsClosed(seconds(10)));
}

TEST_F(ConnectionTest, IdleConnectionsAreClosed) {
  ServerOptions options = TestOptions();
  options.connection_idle = absl::Milliseconds(300);
  StartAlone(options);
  const Peer peer(server().port());
  ASSERT_TRUE(peer.Send(Greeting()));
  EXPECT_TRUE(peer.IsClosed(seconds(10)));
}

// A client is sent to look for other replicas, and what it has under way goes on.
TEST_F(ConnectionTest, OldConnectionsAreReplacedUnderPrompts) {
  ServerOptions options = TestOptions();
  options.connection_age = absl::Milliseconds(200);
  Start(options);
  const Peer idle(server().port());
  ASSERT_TRUE(idle.Send(Greeting()));
  EXPECT_TRUE(idle.IsSentAway(seconds(10)));
  ExpectUndisturbed();
}

TEST(StreamLimitTest, OfAPeerIsNoLessThanThatOfAConnection) {
  ServerOptions options = TestOptions();
  EXPECT_EQ(MaxStreamsPerPeer(options), 512);
  options.max_streams_per_connection = 4;
  EXPECT_EQ(MaxStreamsPerPeer(options), 8);
  options.max_streams_per_peer = 4;
  EXPECT_TRUE(CheckOptions(options).ok());
  options.max_streams_per_peer = 3;
  EXPECT_EQ(Server::Start(options).status(),
            absl::InvalidArgumentError(
                "max-streams-per-peer is 3; at least max-streams-per-connection (4), or 0"));
}

TEST(ListenTest, OfPlacesThatCannotBeHad) {
  ServerOptions options = TestOptions();
  const absl::StatusOr<std::unique_ptr<Server>> first = Server::Start(options);
  ASSERT_TRUE(first.ok()) << first.status();
  options.listen = (*first)->addresses();
  const absl::Status taken = Server::Start(options).status();
  EXPECT_EQ(taken.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(taken.message(),
            "cannot listen on " + options.listen[0] + ": bind: Address already in use");
  for (const char* bad : {"127.0.0.1", "127.0.0.1:x", "127.0.0.1:-1", ":80", "[::1:80", "a b:80",
                          "unix:", "::1:80"}) {
    options.listen = {bad};
    const absl::Status refused = Server::Start(options).status();
    EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(refused.message()),
                ::testing::StartsWith("listen is " + std::string(bad)));
  }
}

TEST(ListenTest, AHostsNameStandsForAllItsAddresses) {
  for (const int64_t limit : {int64_t{0}, int64_t{16}}) {
    ServerOptions options = TestOptions();
    options.listen = {"localhost:0", "127.0.0.1:0"};
    options.max_connections = limit;
    const absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options);
    ASSERT_TRUE(server.ok()) << server.status();
    std::vector<std::shared_ptr<grpc::Channel>> channels;
    for (const std::string& address : (*server)->addresses()) {
      channels.push_back(NewChannel(address));
      EXPECT_EQ(Health(channels.back()), "SERVING") << address;
    }
    EXPECT_EQ((*server)->connections() > 0, limit > 0);
  }
}

}  // namespace
}  // namespace structkv::testkit
