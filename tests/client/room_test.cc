// Regions and rooms for results whose server is slow, silent or gone: nobody waits for it longer
// than he wants to, and rooms come back.
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "structkv/arena.h"
#include "structkv/client.h"
#include "tests/client/fake_region_socket.h"
#include "tests/client/fake_server.h"
#include "tests/testing/process.h"

namespace structkv::client {
namespace {

constexpr size_t kArena = 1 << 16;
constexpr absl::Duration kLong = absl::Seconds(5);  // half of what the library would wait for

// Opens, and waits for the end.
grpc::Status Wait(Stream* stream) {
  Received received;
  if (!ReadOpen(stream, &received)) return {grpc::StatusCode::INVALID_ARGUMENT, "no open"};
  v1::Opened opened = OpenedFor(received.open);
  opened.set_transport(v1::TRANSPORT_SHARED_MEMORY);
  SendOpened(stream, opened);
  v1::CompressRequest request;
  while (stream->Read(&request)) {
  }
  return grpc::Status::CANCELLED;
}

// A region socket that takes connections and says nothing.
class SilentSocket {
 public:
  SilentSocket() : path_(directory_.Path("regions")) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.data(), path_.size());
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(listener_, 16), 0);
  }
  ~SilentSocket() { Close(); }
  const std::string& path() const { return path_; }
  // Ends all connections.
  void Close() { close(std::exchange(listener_, -1)); }

 private:
  const testkit::TemporaryDirectory directory_;
  const std::string path_;
  int listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
};

class RoomTest : public ::testing::Test {
 protected:
  RoomTest()
      : server_([](int, grpc::ServerContext*, Stream* stream) { return Wait(stream); }),
        client_(ClientOf(server_)) {
    server_.region_socket = socket_.path();
    RegionOptions region;
    region.size_bytes = kArena;
    region.quarantine = absl::Milliseconds(100);
    arena_ = std::make_shared<Arena>(*Region::Create(region));
    options_.regions = {arena_->region()};
    options_.results = arena_;
    options_.retry.max_attempts = 1;
  }

  // Cancels that many prompts whose rooms the server may still write to.
  void RetireRooms(int count) {
    std::vector<std::unique_ptr<CompressSession>> sessions;
    for (int i = 0; i < count; ++i) {
      auto session = client_->OpenPrompt(SmallOpen(), options_);
      ASSERT_TRUE(session.ok()) << session.status();
      sessions.push_back(*std::move(session));
    }
    for (const auto& session : sessions) session->Cancel();
    sessions.clear();
    EXPECT_LT(arena_->free_bytes(), kArena);
  }

  absl::Notification over_;  // the server's silence
  FakeRegionSocket socket_;
  FakeServer server_;
  std::unique_ptr<Client> client_;
  std::shared_ptr<Arena> arena_;
  SessionOptions options_;
};

TEST_F(RoomTest, TheServerIsAskedOnceForAllRoomsOfARegion) {
  std::atomic<int> asked = 0;
  server_.regions.on_get = [&](const v1::GetRegionRequest& request, v1::GetRegionResponse*) {
    EXPECT_EQ(request.handle(), std::string(16, 'a'));
    ++asked;
    return grpc::Status::OK;
  };
  RetireRooms(8);
  const size_t taken = kArena - arena_->free_bytes();
  const auto session = client_->OpenPrompt(SmallOpen(), options_);
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ(kArena - arena_->free_bytes(), taken / 8);
  EXPECT_GE(asked, 1);
  EXPECT_LE(asked, 2) << "a thread asks as well";
}

TEST_F(RoomTest, AServerThatDoesNotSayHoldsUpNoPrompt) {
  server_.regions.on_get = [this](const v1::GetRegionRequest&, v1::GetRegionResponse*) {
    over_.WaitForNotification();
    return grpc::Status::OK;
  };
  RetireRooms(3);
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(client_->OpenPrompt(SmallOpen(), options_).ok());
  EXPECT_LT(absl::Now() - begin, kLong);
  over_.Notify();
  EXPECT_TRUE(testkit::Eventually([&] { return arena_->free_bytes() == kArena; }));
}

// The connection that registered the region says whether the server lives.
TEST_F(RoomTest, RoomsOfAServerThatIsGoneComeBack) {
  server_.regions.on_get = [](const v1::GetRegionRequest&, v1::GetRegionResponse*) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
  };
  RetireRooms(2);
  absl::SleepFor(absl::Milliseconds(1500));
  EXPECT_LT(arena_->free_bytes(), kArena) << "it is there, and may write";
  socket_.CloseConnections();
  EXPECT_TRUE(testkit::Eventually([&] { return arena_->free_bytes() == kArena; }));
}

TEST_F(RoomTest, RegisteringTakesNoLongerThanThePrompt) {
  SilentSocket silent;
  server_.region_socket = silent.path();
  options_.timeout = absl::Milliseconds(300);
  absl::Time begin = absl::Now();
  EXPECT_FALSE(client_->OpenPrompt(SmallOpen(), options_).ok());
  EXPECT_LT(absl::Now() - begin, kLong);
  // Nor where another thread is at it, which has more time.
  std::thread other(
      [&] { EXPECT_TRUE(absl::IsUnavailable(client_->Register(*arena_->region()))); });
  begin = absl::Now();
  EXPECT_FALSE(client_->OpenPrompt(SmallOpen(), options_).ok());
  EXPECT_LT(absl::Now() - begin, kLong);
  silent.Close();
  other.join();
}

}  // namespace
}  // namespace structkv::client
