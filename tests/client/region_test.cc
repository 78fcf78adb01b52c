// Regions: their memory, their registration, and that all of it comes back.
#include "structkv/region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <memory>
#include <set>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "tests/client/fake_region_socket.h"
#include "tests/client/fake_server.h"
#include "tests/testing/process.h"

namespace structkv::client {
namespace {

using ::testing::HasSubstr;

std::shared_ptr<Region> NewRegion(size_t bytes, RegionKind kind = RegionKind::kDescriptor) {
  RegionOptions options;
  options.size_bytes = bytes;
  options.kind = kind;
  auto region = Region::Create(options);
  EXPECT_TRUE(region.ok()) << region.status();
  return *std::move(region);
}

// Mappings of this process that hold `name`.
int Mappings(const std::string& name) {
  std::ifstream file("/proc/self/maps");
  int count = 0;
  for (std::string line; std::getline(file, line);) count += line.find(name) != std::string::npos;
  return count;
}

class RegionTest : public ::testing::Test {
 protected:
  RegionTest()
      : server_([](int, grpc::ServerContext*, Stream*) { return grpc::Status::OK; }),
        client_(ClientOf(server_)) {
    server_.region_socket = socket_.path();
    EXPECT_TRUE(client_->GetCapabilities().ok());  // connects
  }

  FakeRegionSocket socket_;
  FakeServer server_;
  std::unique_ptr<Client> client_;
};

TEST_F(RegionTest, IsZeroedWritableAndOfWholePages) {
  for (const RegionKind kind : {RegionKind::kDescriptor, RegionKind::kNamed}) {
    const auto region = NewRegion(10'000, kind);
    EXPECT_EQ(region->size(), 12'288);
    EXPECT_EQ(region->data()[12'287], std::byte{0});
    std::memset(region->data(), 1, region->size());
  }
}

TEST_F(RegionTest, GivesEverythingBack) {
  const int64_t files = testkit::OpenFiles(getpid());
  for (int i = 0; i < 3; ++i) {
    const auto region = NewRegion(1 << 20);
    ASSERT_TRUE(client_->Register(*region).ok());
    EXPECT_EQ(Mappings("memfd:structkv"), 2 + i);  // the fake's too, which keeps its own
    EXPECT_EQ(socket_.connections(), 1);
  }
  EXPECT_TRUE(testkit::Eventually([&] { return socket_.connections() == 0; }));
  socket_.CloseConnections();
  EXPECT_EQ(testkit::OpenFiles(getpid()), files);
  EXPECT_EQ(Mappings("memfd:structkv"), 3);
}

TEST_F(RegionTest, IsSealedAndSaysWhatItIs) {
  const auto region = NewRegion(1 << 16);
  ASSERT_TRUE(client_->Register(*region, "mine").ok());
  const auto registered = socket_.regions();
  ASSERT_EQ(registered.size(), 1);
  EXPECT_EQ(registered[0].seals, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  EXPECT_EQ(registered[0].request.size_bytes(), 1 << 16);
  EXPECT_TRUE(registered[0].request.writable());
  EXPECT_EQ(registered[0].request.tenant(), "name:mine");
  region->data()[5] = std::byte{9};
  EXPECT_EQ(registered[0].memory.get()[5], std::byte{9});
}

TEST_F(RegionTest, IsRegisteredOnceUntilTheServerIsGone) {
  const auto region = NewRegion(4096);
  ASSERT_TRUE(client_->Register(*region).ok());
  ASSERT_TRUE(client_->Register(*region).ok());
  EXPECT_EQ(socket_.regions().size(), 1);
  ASSERT_TRUE(client_->Register(*region, "another tenant").ok());
  EXPECT_EQ(socket_.regions().size(), 2);
  socket_.CloseConnections();
  ASSERT_TRUE(client_->Register(*region).ok());
  EXPECT_EQ(socket_.regions().size(), 3);
}

TEST_F(RegionTest, ErrorsSayWhatIsWrong) {
  EXPECT_EQ(Region::Create({}).status().code(), absl::StatusCode::kInvalidArgument);
  RegionOptions huge;
  huge.size_bytes = size_t{1} << 60;
  EXPECT_THAT(std::string(Region::Create(huge).status().message()),
              HasSubstr("RegionOptions.size_bytes is 1152921504606846976; this machine has "));
  const auto region = NewRegion(4096);
  socket_.Refuse(static_cast<uint32_t>(grpc::StatusCode::RESOURCE_EXHAUSTED), "1 GiB is taken");
  EXPECT_EQ(client_->Register(*region), absl::ResourceExhaustedError("1 GiB is taken"));
  server_.region_socket = "/nowhere/regions";
  const absl::Status away = client_->Register(*region);
  EXPECT_EQ(away.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(away.message()), HasSubstr("region socket /nowhere/regions: connecting"));
  server_.region_socket = std::string(200, 'x');
  EXPECT_EQ(client_->Register(*region).code(), absl::StatusCode::kInvalidArgument);
  server_.region_socket = "";
  EXPECT_EQ(client_->Register(*region).code(), absl::StatusCode::kUnimplemented);
}

// A named region that cannot be registered (the fake knows no such call) leaves nothing behind.
TEST_F(RegionTest, ANameLivesNoLongerThanItsRegistration) {
  const std::set<std::string> before = testkit::RegionNames();
  const auto region = NewRegion(4096, RegionKind::kNamed);
  EXPECT_TRUE(testkit::NoOtherRegionNames(before));
  EXPECT_EQ(client_->Register(*region).code(), absl::StatusCode::kUnimplemented);
  EXPECT_TRUE(testkit::NoOtherRegionNames(before));
  EXPECT_EQ(client_->Register(*region).code(), absl::StatusCode::kFailedPrecondition);
}

// A child has neither the memory nor, once it execs, a descriptor; its end changes nothing.
TEST_F(RegionTest, AForkedChildHasNoPartInIt) {
  const auto region = NewRegion(4096);
  ASSERT_TRUE(client_->Register(*region).ok());
  const pid_t child = fork();
  if (child == 0) {
    unsigned char resident = 0;
    const bool mapped = mincore(region->data(), 4096, &resident) == 0;
    _exit(mapped ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(socket_.connections(), 1);
  testkit::Process other({"/bin/ls", "-l", "/proc/self/fd"});
  other.Wait();
  EXPECT_THAT(other.output(), ::testing::Not(HasSubstr("structkv")));
  region->data()[0] = std::byte{1};
}

}  // namespace
}  // namespace structkv::client
