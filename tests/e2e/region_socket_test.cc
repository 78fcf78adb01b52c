// The region socket and the calls for regions, as a client meets them: what is refused, and how
// long what was registered lives.
#include <unistd.h>

#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/region_test.h"

namespace structkv::testkit {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint64_t kBytes = 64 << 10;

class RegionSocketTest : public RegionTest {
 protected:
  void SetUp() override { StartShared(); }

  template <typename Request, typename Response>
  grpc::Status Call(grpc::Status (v1::Regions::Stub::*method)(grpc::ClientContext*, const Request&,
                                                              Response*),
                    const Request& request, Response* response, const std::string& tenant = "") {
    grpc::ClientContext context;
    if (!tenant.empty()) context.AddMetadata("structkv-tenant", tenant);
    return (Regions().get()->*method)(&context, request, response);
  }

  grpc::Status RegisterName(const std::string& name, uint64_t size, uint64_t lease_millis,
                            v1::RegisterRegionResponse* response) {
    v1::RegisterRegionRequest request;
    request.set_name(name);
    request.set_size_bytes(size);
    request.set_lease_millis(lease_millis);
    return Call(&v1::Regions::Stub::RegisterRegion, request, response);
  }

  grpc::Status Get(const std::string& handle, v1::GetRegionResponse* response,
                   const std::string& tenant = "") {
    v1::GetRegionRequest request;
    request.set_handle(handle);
    return Call(&v1::Regions::Stub::GetRegion, request, response, tenant);
  }

  v1::RegisterDescriptorRequest Wanted(uint64_t size = kBytes) {
    v1::RegisterDescriptorRequest request;
    request.set_size_bytes(size);
    request.set_writable(true);
    return request;
  }

  // Sends a packet that is answered with a refusal; the connection stays.
  void ExpectRefused(const v1::RegisterDescriptorRequest& request, int fd, int files,
                     grpc::StatusCode code, const std::string& text) {
    ASSERT_TRUE(connection().Send(request.SerializeAsString(), fd, files));
    v1::RegisterDescriptorResponse response;
    ASSERT_TRUE(connection().Receive(&response));
    EXPECT_EQ(response.code(), static_cast<uint32_t>(code)) << response.message();
    EXPECT_THAT(response.message(), HasSubstr(text));
    EXPECT_EQ(response.handle(), "");
    EXPECT_EQ(mapped_bytes(), 0);
  }
};

TEST_F(RegionSocketTest, DescriptorsThatAreRefused) {
  const int64_t files = OpenFiles(getpid());
  {
    const auto sealed = SharedFile::Sealed(kBytes);
    const auto bare = SharedFile::WithSeals(kBytes, 0);
    const auto invalid = grpc::StatusCode::INVALID_ARGUMENT;
    ExpectRefused(Wanted(), bare->fd(), 1, grpc::StatusCode::FAILED_PRECONDITION, "F_SEAL_SHRINK");
    ExpectRefused(Wanted(), sealed->fd(), 0, invalid, "0 descriptors; 1 is allowed");
    ExpectRefused(Wanted(), sealed->fd(), 2, invalid, "2 descriptors; 1 is allowed");
    ExpectRefused(Wanted(), sealed->fd(), 100, invalid, "4 descriptors; 1 is allowed");
    ExpectRefused(Wanted(), 0, 1, invalid, "can be sealed");
    ExpectRefused(Wanted(kBytes + 1), sealed->fd(), 1, invalid, "the file has 65536 bytes");
    ExpectRefused(Wanted(0), sealed->fd(), 1, invalid, "size_bytes is 0");
    ExpectRefused(Wanted(UINT64_MAX), sealed->fd(), 1, invalid,
                  "size_bytes is 18446744073709551615");
    v1::RegisterDescriptorRequest request = Wanted();
    request.set_lease_millis(1);
    ExpectRefused(request, sealed->fd(), 1, invalid, "lease_millis is 1; 100 to 600000");
    request.set_lease_millis(UINT64_MAX);
    ExpectRefused(request, sealed->fd(), 1, invalid, "lease_millis");
    request = Wanted();
    request.set_tenant(std::string(2049, 'a'));
    ExpectRefused(request, sealed->fd(), 1, invalid, "tenant is 2049 bytes long");
    EXPECT_EQ(connection().Register(*sealed).code(), 0U);
  }
  connection().Close();
  EXPECT_TRUE(Eventually([&] { return OpenFiles(getpid()) <= files; }))
      << "descriptors that are refused are closed";
}

// Each ends its own connection, and the regions of that one.
TEST_F(RegionSocketTest, PacketsThatEndTheConnection) {
  const auto file = SharedFile::Sealed(kBytes);
  EXPECT_EQ(connection().Register(*file).code(), 0U);
  for (const std::string& packet :
       {std::string("\xff\xff\xff"), std::string(5000, '\n'), std::string()}) {
    RegionConnection other(socket_path());
    ASSERT_TRUE(other.connected());
    EXPECT_EQ(other.Register(*file).code(), 0U);
    EXPECT_EQ(mapped_bytes(), static_cast<int64_t>(2 * kBytes));
    other.Send(packet, file->fd());
    v1::RegisterDescriptorResponse response;
    EXPECT_FALSE(other.Receive(&response));
    EXPECT_TRUE(Eventually([&] { return mapped_bytes() == static_cast<int64_t>(kBytes); }));
  }
}

TEST_F(RegionSocketTest, AConnectionThatDoesNotReadIsClosed) {
  const auto file = SharedFile::Sealed(kBytes);
  RegionConnection silent(socket_path());
  const std::string packet = Wanted(0).SerializeAsString();
  bool taken = true;
  for (int i = 0; i < 100'000 && taken; ++i) taken = silent.Send(packet, file->fd());
  EXPECT_FALSE(taken);
  EXPECT_EQ(connection().Register(*file).code(), 0U) << "others are served";
}

TEST_F(RegionSocketTest, RegionsOfAConnectionAreLimited) {
  const auto file = SharedFile::Sealed(4096);
  for (int i = 0; i < 64; ++i) ASSERT_EQ(connection().Register(*file).code(), 0U);
  const auto refused = connection().Register(*file);
  EXPECT_EQ(refused.code(), static_cast<uint32_t>(grpc::StatusCode::RESOURCE_EXHAUSTED));
  EXPECT_THAT(refused.message(), HasSubstr("64 regions; 64 are allowed"));
}

TEST_F(RegionSocketTest, ConnectionsAreLimited) {
  std::vector<std::unique_ptr<RegionConnection>> connections;
  const auto file = SharedFile::Sealed(4096);
  for (int i = 0; i < 255; ++i) {
    connections.push_back(std::make_unique<RegionConnection>(socket_path()));
    ASSERT_EQ(connections.back()->Register(*file).code(), 0U) << i;
  }
  RegionConnection beyond(socket_path());
  EXPECT_NE(beyond.Register(*file).code(), 0U);
  connections.clear();
  EXPECT_TRUE(Eventually([&] { return mapped_bytes() == 0; }));
  RegionConnection again(socket_path());
  EXPECT_EQ(again.Register(*file).code(), 0U);
}

TEST_F(RegionSocketTest, ARegionIsDescribedAndUnregistered) {
  const auto file = SharedFile::Sealed(kBytes);
  const auto registered = connection().Register(*file, /*writable=*/true, 0, "red");
  ASSERT_EQ(registered.code(), 0U) << registered.message();
  EXPECT_EQ(registered.lease_millis(), 0U);
  v1::GetRegionResponse region;
  EXPECT_EQ(Get(registered.handle(), &region).error_code(), grpc::StatusCode::NOT_FOUND);
  ASSERT_TRUE(Get(registered.handle(), &region, "red").ok());
  EXPECT_EQ(region.state(), v1::REGION_STATE_REGISTERED);
  EXPECT_EQ(region.size_bytes(), kBytes);
  EXPECT_TRUE(region.writable());
  EXPECT_FALSE(region.has_lease_left_millis());
  EXPECT_EQ(region.use_count(), 0U);
  EXPECT_EQ(region.owner(),
            "pid " + std::to_string(getpid()) + ", uid " + std::to_string(getuid()));

  v1::RenewRegionRequest renew;
  renew.set_handle(registered.handle());
  renew.set_lease_millis(60'000);
  v1::RenewRegionResponse renewed;
  ASSERT_TRUE(Call(&v1::Regions::Stub::RenewRegion, renew, &renewed, "red").ok());
  EXPECT_EQ(renewed.lease_millis(), 60'000U);
  ASSERT_TRUE(Get(registered.handle(), &region, "red").ok());
  EXPECT_LE(region.lease_left_millis(), 60'000U);
  EXPECT_GT(region.lease_left_millis(), 50'000U);

  v1::UnregisterRegionRequest unregister;
  unregister.set_handle(registered.handle());
  v1::UnregisterRegionResponse unregistered;
  EXPECT_EQ(Call(&v1::Regions::Stub::UnregisterRegion, unregister, &unregistered).error_code(),
            grpc::StatusCode::NOT_FOUND)
      << "another tenant's";
  ASSERT_TRUE(Call(&v1::Regions::Stub::UnregisterRegion, unregister, &unregistered, "red").ok());
  EXPECT_EQ(unregistered.use_count(), 0U);
  EXPECT_EQ(mapped_bytes(), 0);
  EXPECT_EQ(Get(registered.handle(), &region, "red").error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Get("short", &region).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(RegionSocketTest, ANameLivesByItsLease) {
  const std::string name = "structkv.lease-" + std::to_string(getpid());
  const auto file = SharedFile::Named(name, kBytes);
  v1::RegisterRegionResponse response;
  EXPECT_EQ(RegisterName(name, kBytes + 1, 0, &response).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(RegisterName("../etc/passwd", 1, 0, &response).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(RegisterName(name + "x", kBytes, 0, &response).error_code(),
            grpc::StatusCode::NOT_FOUND);
  EXPECT_TRUE(file->HasName());
  ASSERT_TRUE(RegisterName(name, kBytes, 0, &response).ok());
  EXPECT_EQ(response.lease_millis(), 500U) << "the server's";
  EXPECT_FALSE(file->HasName());
  v1::RenewRegionRequest renew;
  renew.set_handle(response.handle());
  v1::RenewRegionResponse renewed;
  for (int i = 0; i < 4; ++i) {
    usleep(200'000);
    ASSERT_TRUE(Call(&v1::Regions::Stub::RenewRegion, renew, &renewed).ok());
  }
  EXPECT_EQ(mapped_bytes(), static_cast<int64_t>(kBytes));
  EXPECT_TRUE(Eventually([&] { return mapped_bytes() == 0; }, std::chrono::milliseconds(1000)));
  EXPECT_EQ(Call(&v1::Regions::Stub::RenewRegion, renew, &renewed).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(RegionSocketTest, CapabilitiesSaySo) {
  grpc::ClientContext context;
  v1::GetCapabilitiesResponse response;
  ASSERT_TRUE(v1::Compression::NewStub(channel())
                  ->GetCapabilities(&context, v1::GetCapabilitiesRequest(), &response)
                  .ok());
  EXPECT_THAT(response.transports(), ElementsAre("inline", "shared_memory"));
  EXPECT_EQ(response.region_socket(), socket_path());
}

class RegionSocketStartTest : public RegionTest {};

TEST_F(RegionSocketStartTest, AConnectionThatRegistersNothingIsClosed) {
  ServerOptions options = Options();
  options.regions.socket.idle_limit = absl::Milliseconds(100);
  Start(options);
  RegionConnection idle(socket_path());
  RegionConnection busy(socket_path());
  const auto file = SharedFile::Sealed(kBytes);
  EXPECT_EQ(busy.Register(*file).code(), 0U);
  v1::RegisterDescriptorResponse response;
  EXPECT_FALSE(idle.Receive(&response));
  usleep(300'000);
  EXPECT_EQ(busy.Register(*file).code(), 0U);
}

TEST_F(RegionSocketStartTest, APathThatCannotBeHad) {
  Start(Options());
  const absl::Status taken = Server::Start(Options()).status();
  EXPECT_TRUE(absl::IsUnavailable(taken));
  EXPECT_THAT(std::string(taken.message()), HasSubstr("another server does"));
  const TemporaryDirectory directory;
  ServerOptions options = Options();
  options.regions.socket.path = directory.Path("file");
  std::ofstream(options.regions.socket.path) << "precious";
  EXPECT_THAT(std::string(Server::Start(options).status().message()), HasSubstr("no socket"));
  EXPECT_EQ(access(options.regions.socket.path.c_str(), F_OK), 0);
  options.regions.socket.path = directory.Path(std::string(108, 'a'));
  EXPECT_THAT(std::string(Server::Start(options).status().message()), HasSubstr("107 are allowed"));
  options = Options();
  options.regions.regions.lease = absl::Hours(1);
  EXPECT_THAT(std::string(Server::Start(options).status().message()), HasSubstr("region-lease"));
}

TEST_F(RegionSocketStartTest, AServerWithoutSharedMemorySaysSo) {
  Start();
  grpc::ClientContext context;
  v1::GetRegionResponse response;
  const grpc::Status status = Regions()->GetRegion(&context, v1::GetRegionRequest(), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(status.error_message(), HasSubstr("--region-socket"));
}

}  // namespace
}  // namespace structkv::testkit
