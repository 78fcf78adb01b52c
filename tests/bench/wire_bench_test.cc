// The wire benchmark, short: each row has its floor, its times and its copies, or says why not.
#include <map>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/testing/process.h"

namespace structkv::bench {
namespace {

using ::testing::HasSubstr;

// The report of `program`, which is to end well.
nlohmann::json Report(const char* program, const std::vector<std::string>& flags) {
  std::vector<std::string> command = {program, "--json", "--repeats", "0", "--prompts", "0"};
  command.insert(command.end(), flags.begin(), flags.end());
  testkit::Process process(command);
  const auto code = process.Wait(std::chrono::minutes(4));
  EXPECT_EQ(code, 0) << process.error();
  return nlohmann::json::parse(process.output(), nullptr, /*allow_exceptions=*/false);
}

std::map<std::string, nlohmann::json> ByWay(const nlohmann::json& rows) {
  std::map<std::string, nlohmann::json> by_way;
  for (const nlohmann::json& row : rows) by_way[row.at("way")] = row;
  return by_way;
}

void ExpectMeasured(const nlohmann::json& row, const std::string& transport) {
  SCOPED_TRACE(row.dump());
  ASSERT_FALSE(row.contains("skipped"));
  EXPECT_EQ(row.at("transport"), transport);
  EXPECT_GT(row.at("p50_micros"), 0);
  EXPECT_GE(row.at("p99_micros"), row.at("p50_micros").get<double>());
  EXPECT_GT(row.at("floor_p50_micros"), 0);
  EXPECT_GT(row.at("gb_per_s"), 0);
  EXPECT_GE(row.at("cpu_seconds_per_gb"), 0);
}

TEST(WireBenchTest, TransportsWithoutAGpu) {
  const nlohmann::json report =
      Report(STRUCTKV_WIRE_BENCH,
             {"--transports", "1", "--transport-tokens", "4000", "--transport-geometry",
              "tiny-llama", "--backend", "cpu", "--cuda-library", "libno-such-cuda.so.1"});
  ASSERT_TRUE(report.is_object());
  auto rows = ByWay(report.at("transports"));
  ASSERT_EQ(rows.size(), 6);
  ExpectMeasured(rows["in process"], "in-process");
  ExpectMeasured(rows["inline, TCP"], "inline");
  ExpectMeasured(rows["inline, unix socket"], "inline");
  ExpectMeasured(rows["shared memory"], "shared_memory");
  for (const char* way : {"CUDA IPC", "NCCL"}) {
    EXPECT_THAT(rows[way].at("skipped").get<std::string>(),
                HasSubstr("no CUDA driver: libno-such-cuda.so.1"));
  }
#ifdef STRUCTKV_COUNTS_COPIES
  // Of each byte: into a socket, out of it, and to its place; and a little around it.
  for (const char* way : {"inline, TCP", "inline, unix socket"}) {
    EXPECT_GT(rows[way].at("copies_per_byte"), 2.9);
    EXPECT_LT(rows[way].at("copies_per_byte"), 3.5);
    EXPECT_GT(rows[way].at("socket_bytes_per_byte"), 0.99);
    EXPECT_LT(rows[way].at("socket_bytes_per_byte"), 1.1);
  }
  EXPECT_LT(rows["shared memory"].at("copies_per_byte"), 0.3);
  EXPECT_LT(rows["shared memory"].at("socket_bytes_per_byte"), 0.1);
#endif
}

TEST(WireBenchTest, HoldsAndFetches) {
  const nlohmann::json report =
      Report(STRUCTKV_WIRE_BENCH, {"--holds", "1", "--gib", "0.125", "--chunk-mib", "1"});
  ASSERT_TRUE(report.is_object());
  ASSERT_EQ(report.at("holds").size(), 2);
  for (const nlohmann::json& socket : report.at("holds")) {
    for (const char* way : {"send", "hold", "fetch", "fetch_shared"}) {
      const nlohmann::json& row = socket.at(way);
      SCOPED_TRACE(row.dump());
      EXPECT_GT(row.at("p50_seconds"), 0);
      EXPECT_GE(row.at("p99_seconds"), row.at("p50_seconds").get<double>());
      EXPECT_GT(row.at("floor_gb_per_s"), 0);
      EXPECT_GT(row.at("gb_per_s"), 0);
      EXPECT_GE(row.at("cpu_seconds_per_gb"), 0);
    }
#ifdef STRUCTKV_COUNTS_COPIES
    EXPECT_NEAR(socket.at("send").at("copies_per_byte"), 3, 0.3);
    EXPECT_NEAR(socket.at("hold").at("copies_per_byte"), 3, 0.3);
    EXPECT_NEAR(socket.at("fetch").at("copies_per_byte"), 2, 0.3);
    EXPECT_NEAR(socket.at("fetch_shared").at("copies_per_byte"), 1, 0.3);
    EXPECT_LT(socket.at("fetch_shared").at("socket_bytes_per_byte"), 0.1);
#endif
  }
}

#ifdef STRUCTKV_GPU_WIRE_BENCH

// On the CUDA runtime without a GPU and the library that stands in for NCCL.
std::map<std::string, nlohmann::json> OnGpus(const std::string& nccl_gpu) {
  const nlohmann::json report =
      Report(STRUCTKV_GPU_WIRE_BENCH,
             {"--transports", "1", "--transport-tokens", "64", "--transport-geometry", "tiny-llama",
              "--backend", "cpu", "--count-program", "", "--gpu-server",
              STRUCTKV_GPU_SERVER " --device-memory 192MiB --nccl-memory 64MiB", "--cuda-library",
              "", "--nccl-library", STRUCTKV_FAKE_NCCL, "--nccl-gpu", nccl_gpu});
  EXPECT_TRUE(report.is_object());
  return ByWay(report.at("transports"));
}

TEST(WireBenchTest, TransportsOfTwoGpus) {
  auto rows = OnGpus("1");
  ASSERT_EQ(rows.size(), 6);
  ExpectMeasured(rows["shared memory"], "shared_memory");
  ExpectMeasured(rows["CUDA IPC"], "cuda_ipc");
  ExpectMeasured(rows["NCCL"], "nccl");
}

TEST(WireBenchTest, NcclNeedsASecondGpu) {
  auto rows = OnGpus("2");
  ExpectMeasured(rows["CUDA IPC"], "cuda_ipc");
  EXPECT_THAT(rows["NCCL"].at("skipped").get<std::string>(), HasSubstr("GPU 2: cuDeviceGet"));
}

#endif

}  // namespace
}  // namespace structkv::bench
