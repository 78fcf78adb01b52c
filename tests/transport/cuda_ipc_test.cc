// Regions of a GPU's memory: who may use them, what is waited for, and when they are closed. The
// memory is the test's own.
#include "service/transport/cuda_ipc.h"

#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/transport/shared_memory.h"
#include "tests/testing/fake_clock.h"
#include "tests/transport/region_makers.h"

namespace structkv::transport {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kBytes = 64 << 10;

class OwnMemory final : public ImportedMemory {
 public:
  // `open` is counted down when it is closed, which takes until `gate` is unlocked.
  OwnMemory(int gpu, int* open, std::mutex* gate, absl::Status ready)
      : gpu_(gpu), open_(*open), gate_(*gate), ready_(std::move(ready)), bytes_(kBytes) {
    ++open_;
  }
  ~OwnMemory() override {
    const std::lock_guard lock(gate_);
    --open_;
  }

  std::byte* data() const override { return bytes_.data(); }
  int gpu() const override { return gpu_; }
  absl::Status Await(std::chrono::steady_clock::time_point /*end*/) const override {
    return ready_;
  }

 private:
  const int gpu_;
  int& open_;
  std::mutex& gate_;
  const absl::Status ready_;
  mutable std::vector<std::byte> bytes_;
};

// Notes until when it may be waited for.
class NotedMemory final : public ImportedMemory {
 public:
  explicit NotedMemory(std::vector<std::chrono::steady_clock::time_point>* ends) : ends_(*ends) {}

  std::byte* data() const override { return bytes_.data(); }
  int gpu() const override { return 0; }
  absl::Status Await(std::chrono::steady_clock::time_point end) const override {
    ends_.push_back(end);
    return absl::OkStatus();
  }

 private:
  std::vector<std::chrono::steady_clock::time_point>& ends_;
  mutable std::vector<std::byte> bytes_ = std::vector<std::byte>(kBytes);
};

class CudaIpcTest : public ::testing::Test {
 protected:
  CudaIpcTest() { request_.tenant = "name:a"; }

  absl::StatusOr<RegisteredRegion> Add(const NewRegion& wanted, int gpu = 0,
                                       absl::Status ready = absl::OkStatus()) {
    const auto open = [&] {
      ++opens_;
      return absl::StatusOr<std::unique_ptr<RegionMemory>>(
          GpuRegion(std::make_unique<OwnMemory>(gpu, &open_, &gate_, std::move(ready)), kBytes,
                    wanted.writable));
    };
    return registry_.AddMemory(open, wanted);
  }
  std::string Added(int gpu = 0, absl::Status ready = absl::OkStatus()) {
    return Add(kWanted, gpu, std::move(ready))->handle;
  }
  absl::Status Refusal() { return GrantCudaIpc(registry_, request_, sizes_).status(); }

  const NewRegion kWanted = {
      .size_bytes = kBytes, .writable = true, .lease = absl::Seconds(20), .tenant = "name:a"};
  const std::shared_ptr<testkit::FakeClock> clock_ = std::make_shared<testkit::FakeClock>();
  int open_ = 0;
  int opens_ = 0;  // so far
  std::mutex gate_;
  RegionRegistry registry_{{.max_bytes = 4 * kBytes, .clock = clock_}};
  TransportRequest request_;
  PromptSizes sizes_{.layers = 3, .key_bytes = 1000, .value_bytes = 500};
};

TEST_F(CudaIpcTest, KeysAndValuesAloneAreReadThere) {
  request_.regions = {Added(1), Added(1)};
  request_.results = {1, 1024, 3 * 1536};
  const auto granted = GrantCudaIpc(registry_, request_, sizes_);
  ASSERT_TRUE(granted.ok()) << granted.status();
  const Transport& transport = **granted;
  EXPECT_EQ(transport.kind(), Kind::kCudaIpc);
  EXPECT_TRUE(transport.in_place());
  EXPECT_FALSE(transport.host_readable());
  EXPECT_TRUE(transport.Await().ok());
  EXPECT_TRUE(transport.Check().ok());
  const auto keys = transport.ResolveInPlace({0, 64, 100});
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(keys->is_lent());
  EXPECT_THAT(std::string(transport.Resolve({0, 64, 100}).status().message()),
              HasSubstr("other tensors come as `data`"));
  EXPECT_TRUE(absl::IsInvalidArgument(transport.ResolveInPlace({0, 64, kBytes}).status()));
  engine::LayerInput input;
  input.layer = 2;
  transport.GiveRoom(&input);
  EXPECT_EQ(transport.result_place().SourceOf(2, input.key_room.span()),
            ResultSource(RegionRange{1, 1024 + 2 * 1536, 1000}));
}

TEST_F(CudaIpcTest, WhatCannotBeGrantedLeavesTheNextWish) {
  const auto expect = [this](const std::string& text) {
    const absl::Status status = Refusal();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  };
  expect("open.regions names none");
  request_.regions = {Added(0), Added(1)};
  expect("open.regions[1] lies on GPU 1 and open.regions[0] on GPU 0; all of a prompt lie on one");
  sizes_.pulled = true;
  expect("open.pull");
  sizes_.pulled = false;
  const auto file = testkit::SharedFile::Sealed(4096);
  request_.regions = {registry_.AddDescriptor(Copy(*file), Wanted(*file))->handle};
  expect("open.regions[0] is memory of the host");
  request_.regions = {Added(0)};
  EXPECT_TRUE(absl::IsFailedPrecondition(GrantSharedMemory(registry_, request_, sizes_).status()));
  request_.tenant = "name:b";
  EXPECT_TRUE(absl::IsNotFound(Refusal()));
}

TEST_F(CudaIpcTest, AnEventThatIsNotReachedNamesItsRegion) {
  request_.regions = {Added(), Added(0, absl::DeadlineExceededError("not reached"))};
  const auto granted = GrantCudaIpc(registry_, request_, sizes_);
  ASSERT_TRUE(granted.ok()) << granted.status();
  const absl::Status status = (*granted)->Await();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status));
  EXPECT_EQ(status.message(), "open.regions[1]: not reached; a layer waits 5 s for its regions");
}

// A layer does not wait as long again for each of its regions.
TEST_F(CudaIpcTest, AllRegionsTogetherAreWaitedForOnce) {
  std::vector<std::chrono::steady_clock::time_point> ends;
  for (int i = 0; i < 3; ++i) {
    const auto open = [&] {
      return absl::StatusOr<std::unique_ptr<RegionMemory>>(
          GpuRegion(std::make_unique<NotedMemory>(&ends), kBytes, true));
    };
    request_.regions.push_back(registry_.AddMemory(open, kWanted)->handle);
  }
  const auto granted = GrantCudaIpc(registry_, request_, sizes_);
  ASSERT_TRUE(granted.ok()) << granted.status();
  EXPECT_TRUE((*granted)->Await().ok());
  ASSERT_EQ(ends.size(), 3U);
  EXPECT_EQ(ends[0], ends[2]);
  EXPECT_LE(ends[0], std::chrono::steady_clock::now() + std::chrono::seconds(5));
}

TEST_F(CudaIpcTest, WhatIsRefusedIsClosed) {
  NewRegion bad = kWanted;
  bad.lease = absl::Milliseconds(1);
  EXPECT_TRUE(absl::IsInvalidArgument(Add(bad).status()));
  bad = kWanted;
  bad.size_bytes = UINT64_MAX;
  const absl::Status size = Add(bad).status();
  EXPECT_TRUE(absl::IsInvalidArgument(size));
  EXPECT_THAT(std::string(size.message()), HasSubstr("size_bytes is 18446744073709551615; 1 to"));
  EXPECT_EQ(opens_, 0) << "it is not even opened";
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(Add(kWanted).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(Add(kWanted).status()));
  EXPECT_EQ(open_, 4);
}

// The exporter may free what it has unregistered once nobody uses it.
TEST_F(CudaIpcTest, IsClosedBeforeUnregisterSaysSo) {
  const std::string handle = Added();
  request_.regions = {handle};
  auto granted = GrantCudaIpc(registry_, request_, sizes_);
  ASSERT_TRUE(granted.ok());
  auto keys = (*granted)->ResolveInPlace({0, 64, 100});
  EXPECT_EQ(*registry_.Unregister(handle, "name:a"), 1);
  EXPECT_TRUE(absl::IsNotFound(Refusal()));
  granted->reset();
  EXPECT_EQ(*registry_.Unregister(handle, "name:a"), 1) << "a tensor is still used";
  EXPECT_EQ(open_, 1);
  keys->Reset();
  EXPECT_EQ(open_, 0);
  EXPECT_TRUE(absl::IsNotFound(registry_.Get(handle, "name:a").status()));
}

// Closing takes time: until it is over the region is there, and in use.
TEST_F(CudaIpcTest, IsThereUntilItIsClosed) {
  const std::string handle = Added();
  gate_.lock();
  std::thread other([&] { EXPECT_EQ(*registry_.Unregister(handle, "name:a"), 0); });
  while (!registry_.Get(handle, "name:a")->unregistering) std::this_thread::yield();
  EXPECT_EQ(registry_.Get(handle, "name:a")->uses, 1);
  EXPECT_EQ(*registry_.Unregister(handle, "name:a"), 1);
  EXPECT_EQ(registry_.mapped_bytes(), kBytes);
  gate_.unlock();
  other.join();
  EXPECT_TRUE(absl::IsNotFound(registry_.Get(handle, "name:a").status()));
  EXPECT_EQ(registry_.mapped_bytes(), 0);
}

TEST_F(CudaIpcTest, ItsLeaseEnds) {
  const std::string used = Added();
  const std::string idle = Added();
  request_.regions = {used};
  auto granted = GrantCudaIpc(registry_, request_, sizes_);
  clock_->Advance(std::chrono::seconds(19));
  registry_.Expire();
  EXPECT_EQ(open_, 2);
  clock_->Advance(std::chrono::seconds(1));
  registry_.Expire();
  EXPECT_EQ(open_, 1) << "what nobody uses is closed at once";
  EXPECT_TRUE(registry_.Get(used, "name:a")->unregistering);
  EXPECT_TRUE(absl::IsNotFound(registry_.Renew(used, "name:a", std::nullopt).status()));
  granted->reset();
  EXPECT_EQ(open_, 0);
}

}  // namespace
}  // namespace structkv::transport
