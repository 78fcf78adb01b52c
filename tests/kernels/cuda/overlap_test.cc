// The benchmark of copies that overlap with computation, end to end on the fake runtime: what it
// says of times means nothing here, its rows and its checks do.
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/gpu/overlap_bench.h"
#include "tests/kernels/cuda/fake_backend.h"

namespace structkv {
namespace {

using gpu::OverlapOptions;
using gpu::OverlapRow;
using testing::FakeCuda;
using testing::FakeHeld;
using ::testing::HasSubstr;
using testing::MakeFakeBackend;

constexpr int64_t kMiB = int64_t{1} << 20;
const cuda::DeviceOptions kDevice = {.memory_bytes = 128 * kMiB,
                                     .reserve_bytes = 64 * kMiB,
                                     .slice_bytes = testing::kFakeSliceBytes};

OverlapOptions Small() {
  return {.tokens = {600, 1100},
          .prompts = {1, 3},
          .query_heads = 4,
          .kv_heads = 2,
          .dim = 64,
          .window = 4,
          .layers = 4,
          .rounds = 2};
}

class OverlapTest : public ::testing::Test {
 protected:
  void TearDown() override {
    EXPECT_EQ(FakeCuda::held(), FakeHeld());
    EXPECT_EQ(FakeCuda::registered_bytes(), 0);
  }
};

TEST_F(OverlapTest, ReportsEveryRowAndTheResultsAreTheCpus) {
  FakeCuda::Reset({});
  const auto backend = MakeFakeBackend(kDevice);
  const OverlapOptions options = Small();
  const auto rows = gpu::MeasureOverlap(*backend, options);
  ASSERT_TRUE(rows.ok()) << rows.status();
  const auto json = nlohmann::json::parse(gpu::OverlapJson(backend->device(), *rows));
  EXPECT_EQ(json["device"], backend->device());
  ASSERT_EQ(json["rows"].size(), 8U);
  size_t at = 0;
  for (const std::string memory : {"pinned", "pageable"}) {
    for (const int64_t tokens : options.tokens) {
      for (const int prompts : options.prompts) {
        const auto& row = json["rows"][at++];
        EXPECT_EQ(row["memory"], memory);
        EXPECT_EQ(row["tokens"], tokens);
        EXPECT_EQ(row["prompts"], prompts);
        const double copies = row["copies_micros"];
        const double compute = row["compute_micros"];
        const double together = row["together_micros"];
        EXPECT_GT(copies, 0);
        EXPECT_GT(compute, 0);
        EXPECT_GT(together, 0);
        EXPECT_NEAR(row["over_max"], together / std::max(copies, compute), 2e-3);
        EXPECT_NEAR(row["over_sum"], together / (copies + compute), 2e-3);
        EXPECT_EQ(row["positions_off_cpu"], 0);
      }
    }
  }
  const std::string table = gpu::OverlapTable(*rows);
  EXPECT_THAT(table, HasSubstr("| pinned | 600 | 1 |"));
  EXPECT_THAT(table, HasSubstr("| pageable | 1100 | 3 |"));
}

// Copies alone that are none would be a measurement of nothing.
TEST_F(OverlapTest, SaysWhatItCannotMeasure) {
  FakeCuda::Reset({.count = 2});
  const absl::Status two = gpu::MeasureOverlap(*MakeFakeBackend(kDevice), Small()).status();
  EXPECT_EQ(two.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(two.message()), HasSubstr("2 GPUs; one is measured"));
  FakeCuda::Reset({});
  const auto backend = MakeFakeBackend(kDevice, {.not_pinned = [](const absl::Status& /*why*/) {}});
  FakeCuda::FailAllocation(0, cudaErrorMemoryAllocation);
  const absl::Status pageable = gpu::MeasureOverlap(*backend, Small()).status();
  EXPECT_EQ(pageable.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(pageable.message()), HasSubstr("were not staged"));
}

}  // namespace
}  // namespace structkv
