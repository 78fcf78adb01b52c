// What /metrics says of GPUs, on the fake CUDA runtime and the fake NCCL.
#include <map>
#include <memory>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/admin/admin.h"
#include "tests/admin/http_get.h"
#include "tests/admin/series.h"
#include "tests/testing/nccl_test.h"

namespace structkv::testkit {
namespace {

class GpuMetricsTest : public NcclTest {
 protected:
  void SetUp() override {
    ServerOptions options = Options(/*impatient=*/true);
    options.observer = &telemetry_;
    StartNccl(options);
    auto admin = admin::Admin::Start({.address = "127.0.0.1:0"}, &server(), &telemetry_, &log_);
    ASSERT_TRUE(admin.ok()) << admin.status();
    admin_ = *std::move(admin);
  }
  // Before what it tells of is gone, and after the last stream has told the telemetry of its end.
  void TearDown() override {
    admin_.reset();
    ExpectNothingHeld();
  }

  std::map<std::string, double> Series(const std::string& name) {
    return SeriesOf(HttpGet(admin_->address(), "/metrics").body, "structkv_" + name);
  }

  admin::Telemetry telemetry_;
  rpc::Log log_{rpc::LogFormat::kText};
  std::unique_ptr<admin::Admin> admin_;
};

TEST_F(GpuMetricsTest, PoolsOfEachGpu) {
  auto limits = Series("memory_limit_bytes");
  EXPECT_EQ(limits["pool=\"gpu0\""], 60 << 20);
  EXPECT_EQ(limits["pool=\"gpu0_resident\""], 4 << 20);
  EXPECT_EQ(limits["pool=\"gpu0_nccl\""], kReserveBytes);
  auto reserved = Series("memory_reserved_bytes");
  EXPECT_EQ(reserved["pool=\"gpu0\""], 0);
  EXPECT_EQ(reserved["pool=\"gpu0_resident\""], 0);
  EXPECT_EQ(reserved["pool=\"gpu0_nccl\""], 0);
  {
    const auto taken = server().sessions().backend().Reserve(0, 1 << 20);
    ASSERT_TRUE(taken.ok()) << taken.status();
    EXPECT_EQ(Series("memory_reserved_bytes")["pool=\"gpu0_nccl\""], 1 << 20);
  }
  EXPECT_EQ(Series("memory_reserved_bytes")["pool=\"gpu0_nccl\""], 0);
  EXPECT_EQ(Series("ipc_handles_open")[""], 0);
}

TEST_F(GpuMetricsTest, BytesOfNcclAndItsAborts) {
  const PromptData data(SmallOpen(), 5);
  {
    NcclClient client(NewChannel(target()), "good");
    NcclPrompt prompt(data, &client);
    ExpectResult(prompt.Run(channel()), Inline(data));
  }
  EXPECT_TRUE(Eventually([&] {
    return Series("sessions_total")["result=\"ok\""] == 2 && Series("nccl_pairs")[""] == 0 &&
           Series("streams_active")[""] == 0;
  }));
  const double input = Series("input_bytes_total")["transport=\"nccl\""];
  EXPECT_EQ(input, static_cast<double>(data.total_bytes()));
  // The pair was ended by its client, with the communicator that it had.
  EXPECT_TRUE(Eventually([&] { return Series("nccl_aborts_total")[""] == 1; }));

  NcclClient client(NewChannel(target()), "faulty");
  nccl::testing::FaultNext("hang@0");
  NcclPrompt prompt(data, &client);
  ExpectFailure(prompt.Run(channel()), grpc::StatusCode::UNAVAILABLE,
                {"a group of transfers took longer than 2s"});
  EXPECT_TRUE(Eventually([&] { return Series("nccl_aborts_total")[""] == 2; }));
  EXPECT_TRUE(Eventually([&] { return Series("sessions_total")["result=\"unavailable\""] == 1; }));
}

}  // namespace
}  // namespace structkv::testkit
