// Regions' lives: leases on a clock of the test's own, uses, connections, limits.
#include "service/transport/region_registry.h"

#include <fcntl.h>
#include <unistd.h>

#include <set>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/process.h"
#include "tests/transport/region_makers.h"

namespace structkv::transport {
namespace {

using ::testing::HasSubstr;
using testkit::SharedFile;

constexpr uint64_t kBytes = 64 << 10;

class RegionRegistryTest : public ::testing::Test {
 protected:
  RegionRegistryTest() { Make({}); }
  ~RegionRegistryTest() override {
    registry_.reset();
    EXPECT_EQ(testkit::OpenFiles(getpid()), files_) << "descriptors are closed";
  }

  void Make(RegionOptions options) {
    options.clock = clock_;
    registry_ = std::make_unique<RegionRegistry>(std::move(options));
  }

  RegisteredRegion Add(const SharedFile& file, NewRegion wanted) {
    const absl::StatusOr<RegisteredRegion> added = registry_->AddDescriptor(Copy(file), wanted);
    EXPECT_TRUE(added.ok()) << added.status();
    return added.value_or(RegisteredRegion{});
  }

  void ExpectNotFound(const std::string& handle, const std::string& tenant) {
    EXPECT_TRUE(absl::IsNotFound(registry_->Get(handle, tenant).status()));
    EXPECT_TRUE(absl::IsNotFound(registry_->Renew(handle, tenant, std::nullopt).status()));
    EXPECT_TRUE(absl::IsNotFound(registry_->Use(handle, tenant).status()));
    EXPECT_TRUE(absl::IsNotFound(registry_->Unregister(handle, tenant).status()));
  }

  const int64_t files_ = testkit::OpenFiles(getpid());
  const std::shared_ptr<testkit::FakeClock> clock_ = std::make_shared<testkit::FakeClock>();
  std::unique_ptr<RegionRegistry> registry_;
};

TEST_F(RegionRegistryTest, IsReadWhereItLies) {
  const auto file = SharedFile::Sealed(kBytes);
  const RegisteredRegion region = Add(*file, Wanted(*file));
  EXPECT_EQ(region.handle.size(), kHandleBytes);
  EXPECT_FALSE(region.lease.has_value());
  {
    const auto use = registry_->Use(region.handle, "name:a");
    ASSERT_TRUE(use.ok());
    file->data()[5] = 'x';
    EXPECT_EQ((*use)->memory().data()[5], std::byte{'x'});
    (*use)->memory().data()[6] = std::byte{'y'};
    EXPECT_EQ(file->data()[6], 'y');
    const auto info = registry_->Get(region.handle, "name:a");
    ASSERT_TRUE(info.ok());
    EXPECT_EQ(info->uses, 1);
    EXPECT_EQ(info->size_bytes, static_cast<int64_t>(kBytes));
    EXPECT_EQ(info->owner, "a test");
    EXPECT_FALSE(info->lease_left.has_value() || info->broken || info->unregistering);
  }
  EXPECT_EQ(registry_->Get(region.handle, "name:a")->uses, 0);
  EXPECT_EQ(registry_->mapped_bytes(), static_cast<int64_t>(kBytes));
  EXPECT_EQ(*registry_->Unregister(region.handle, "name:a"), 0);
  EXPECT_EQ(registry_->mapped_bytes(), 0);
  ExpectNotFound(region.handle, "name:a");
}

TEST_F(RegionRegistryTest, AnotherTenantsHandleIsUnknown) {
  const auto file = SharedFile::Sealed(kBytes);
  const RegisteredRegion region = Add(*file, Wanted(*file));
  ExpectNotFound(region.handle, "name:b");
  ExpectNotFound(region.handle, "");
  std::string wrong = region.handle;
  wrong[0] = static_cast<char>(wrong[0] ^ 1);
  ExpectNotFound(wrong, "name:a");
  EXPECT_TRUE(registry_->Get(region.handle, "name:a").ok());
}

TEST_F(RegionRegistryTest, HandlesDiffer) {
  const auto file = SharedFile::Sealed(4096);
  std::set<std::string> handles;
  for (int i = 0; i < 100; ++i) handles.insert(Add(*file, Wanted(*file)).handle);
  EXPECT_EQ(handles.size(), 100U);
}

// Unregistering waits for the last use, and refuses new ones at once.
TEST_F(RegionRegistryTest, StaysMappedWhileItIsUsed) {
  const auto file = SharedFile::Sealed(kBytes);
  file->data()[0] = 'x';
  const RegisteredRegion region = Add(*file, Wanted(*file));
  auto one = *registry_->Use(region.handle, "name:a");
  auto other = *registry_->Use(region.handle, "name:a");
  EXPECT_EQ(*registry_->Unregister(region.handle, "name:a"), 2);
  EXPECT_EQ(*registry_->Unregister(region.handle, "name:a"), 2) << "again is no error";
  EXPECT_TRUE(absl::IsNotFound(registry_->Use(region.handle, "name:a").status()));
  EXPECT_TRUE(absl::IsNotFound(registry_->Renew(region.handle, "name:a", {}).status()));
  EXPECT_TRUE(registry_->Get(region.handle, "name:a")->unregistering);
  one.reset();
  EXPECT_EQ(registry_->mapped_bytes(), static_cast<int64_t>(kBytes));
  EXPECT_EQ(other->memory().data()[0], std::byte{'x'});
  other.reset();
  EXPECT_EQ(registry_->mapped_bytes(), 0);
  ExpectNotFound(region.handle, "name:a");
}

TEST_F(RegionRegistryTest, AUseOutlivesTheRegistry) {
  const auto file = SharedFile::Sealed(kBytes);
  file->data()[0] = 'x';
  auto use = *registry_->Use(Add(*file, Wanted(*file)).handle, "name:a");
  registry_.reset();
  EXPECT_EQ(use->memory().data()[0], std::byte{'x'});
}

TEST_F(RegionRegistryTest, ALeaseEnds) {
  const auto file = SharedFile::Sealed(kBytes);
  NewRegion wanted = Wanted(*file);
  wanted.lease = absl::Seconds(5);
  const RegisteredRegion region = Add(*file, wanted);
  EXPECT_EQ(region.lease, absl::Seconds(5));
  clock_->Advance(std::chrono::seconds(3));
  EXPECT_EQ(registry_->Get(region.handle, "name:a")->lease_left, absl::Seconds(2));
  EXPECT_EQ(*registry_->Renew(region.handle, "name:a", absl::Seconds(4)), absl::Seconds(4));
  clock_->Advance(std::chrono::milliseconds(3999));
  registry_->Expire();
  EXPECT_TRUE(registry_->Get(region.handle, "name:a").ok());
  auto use = *registry_->Use(region.handle, "name:a");
  clock_->Advance(std::chrono::milliseconds(1));
  registry_->Expire();
  EXPECT_TRUE(registry_->Get(region.handle, "name:a")->unregistering) << "it is in use";
  use.reset();
  ExpectNotFound(region.handle, "name:a");
}

TEST_F(RegionRegistryTest, LeasesOutOfRangeAreRefused) {
  const auto file = SharedFile::Sealed(kBytes);
  for (const absl::Duration lease :
       {absl::Milliseconds(99), absl::Minutes(10) + absl::Milliseconds(1), LeaseOf(UINT64_MAX)}) {
    NewRegion wanted = Wanted(*file);
    wanted.lease = lease;
    const absl::Status status = registry_->AddDescriptor(Copy(*file), wanted).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status));
    EXPECT_THAT(std::string(status.message()), HasSubstr("100 to 600000 are allowed"));
  }
  const RegisteredRegion region = Add(*file, Wanted(*file));
  EXPECT_EQ(*registry_->Renew(region.handle, "name:a", std::nullopt), std::nullopt)
      << "it has none, and none is asked for";
  EXPECT_TRUE(absl::IsInvalidArgument(
      registry_->Renew(region.handle, "name:a", absl::Milliseconds(1)).status()));
}

TEST_F(RegionRegistryTest, AConnectionTakesItsRegionsWithIt) {
  const auto file = SharedFile::Sealed(kBytes);
  const RegisteredRegion one = Add(*file, Wanted(*file));
  NewRegion other_wanted = Wanted(*file);
  other_wanted.connection = 2;
  const RegisteredRegion other = Add(*file, other_wanted);
  EXPECT_EQ(registry_->RegionsOf(1), 1);
  auto use = *registry_->Use(one.handle, "name:a");
  registry_->EndConnection(1);
  EXPECT_EQ(registry_->RegionsOf(1), 0);
  EXPECT_TRUE(registry_->Get(one.handle, "name:a")->unregistering);
  EXPECT_FALSE(registry_->Get(other.handle, "name:a")->unregistering);
  use.reset();
  ExpectNotFound(one.handle, "name:a");
}

TEST_F(RegionRegistryTest, Limits) {
  Make({.max_bytes = 3 * static_cast<int64_t>(kBytes), .max_regions = 3});
  const auto file = SharedFile::Sealed(kBytes);
  for (const uint64_t size : {uint64_t{0}, UINT64_MAX, uint64_t{INT64_MAX}, uint64_t{1} << 63,
                              3 * uint64_t{kBytes} + 1}) {
    NewRegion wanted = Wanted(*file);
    wanted.size_bytes = size;
    EXPECT_TRUE(absl::IsInvalidArgument(registry_->AddDescriptor(Copy(*file), wanted).status()));
  }
  const auto large = SharedFile::Sealed(2 * kBytes);
  const RegisteredRegion first = Add(*large, Wanted(*large));
  const absl::Status full = registry_->AddDescriptor(Copy(*large), Wanted(*large)).status();
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_THAT(std::string(full.message()), HasSubstr("196608 are allowed together"));
  Add(*file, Wanted(*file));
  EXPECT_EQ(*registry_->Unregister(first.handle, "name:a"), 0);
  Add(*file, Wanted(*file));
  Add(*file, Wanted(*file));
  const absl::Status many = registry_->AddDescriptor(Copy(*file), Wanted(*file)).status();
  EXPECT_TRUE(absl::IsResourceExhausted(many));
  EXPECT_EQ(registry_->regions(), 3);
}

TEST_F(RegionRegistryTest, WritingNeedsAFileThatMayBeWritten) {
  const auto file = SharedFile::Sealed(kBytes);
  ASSERT_EQ(fcntl(file->fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
  EXPECT_TRUE(
      absl::IsPermissionDenied(registry_->AddDescriptor(Copy(*file), Wanted(*file)).status()));
  EXPECT_TRUE(registry_->AddDescriptor(Copy(*file), Wanted(*file, /*writable=*/false)).ok());
}

TEST_F(RegionRegistryTest, ANameIsGoneOnceItIsRegistered) {
  const std::string name = std::string(kRegionPrefix) + "registry-" + std::to_string(getpid());
  const auto file = SharedFile::Named(name, kBytes);
  file->data()[0] = 'x';
  const absl::StatusOr<RegisteredRegion> region = registry_->AddName(name, Wanted(*file));
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(region->lease, absl::Seconds(30)) << "a name always has one";
  EXPECT_FALSE(file->HasName());
  EXPECT_EQ((*registry_->Use(region->handle, "name:a"))->memory().data()[0], std::byte{'x'});
  EXPECT_EQ(registry_->Get(region->handle, "name:a")->owner, "uid " + std::to_string(getuid()));
  ASSERT_TRUE(file->Truncate(100));
  EXPECT_TRUE(registry_->Get(region->handle, "name:a")->broken);
  EXPECT_TRUE(absl::IsFailedPrecondition(registry_->Use(region->handle, "name:a").status()));
  EXPECT_EQ(registry_->Get(region->handle, "name:a")->uses, 0);
  EXPECT_EQ(*registry_->Unregister(region->handle, "name:a"), 0);
}

// Uses come and go while leases end and connections close.
TEST_F(RegionRegistryTest, ManyThreads) {
  const auto file = SharedFile::Sealed(kBytes);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        NewRegion wanted = Wanted(*file);
        wanted.connection = t + 1;
        const auto region = registry_->AddDescriptor(Copy(*file), wanted);
        if (!region.ok()) continue;
        const auto use = registry_->Use(region->handle, "name:a");
        if (i % 3 == 0) registry_->EndConnection(1 + i % 4);
        if (i % 5 == 0) registry_->Expire();
        EXPECT_TRUE(!use.ok() || (*use)->memory().Check().ok());
        registry_->Unregister(region->handle, "name:a").status().IgnoreError();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(registry_->mapped_bytes(), 0);
  EXPECT_EQ(registry_->regions(), 0);
}

}  // namespace
}  // namespace structkv::transport
