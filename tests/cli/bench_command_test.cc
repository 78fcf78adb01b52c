// `structkv bench` as a user runs it: a process, with a real server or alone.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/cli/run_command.h"
#include "tests/testing/process.h"

namespace structkv::cli {
namespace {

using ::testing::HasSubstr;

using BenchCommandTest = CommandTest;

TEST_F(BenchCommandTest, MeasuresASyntheticPrompt) {
  const Ran ran = RunCommand(
      "bench --in-process --geometry tiny-llama --tokens 500 --prompts 4 --concurrency 2 --json");
  ASSERT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(ran.output, HasSubstr("\"prompts\": 4"));
}

// Layers that send nothing are answered after the start of their prompt.
TEST_F(BenchCommandTest, TimesLayersThatSendNothing) {
  for (const char* method : {"gemfilter --filter-layer 3", "streaming_llm --plan"}) {
    const Ran ran = RunCommand(absl::StrCat(
        "bench --in-process --geometry tiny-llama --tokens 300 --json --prompts 1 --method ",
        method));
    ASSERT_EQ(ran.code, 0) << ran.output;
    const auto json = nlohmann::json::parse(ran.output);
    EXPECT_LE(json.at("layer_seconds").at("p99"), json.at("seconds")) << ran.output;
  }
}

TEST_F(BenchCommandTest, KnowsLatentAttention) {
  const Ran ran = RunCommand(
      "bench --in-process --geometry deepseek-v3 --layers 3 --tokens 300 --prompts 1 --json");
  ASSERT_EQ(ran.code, 0) << ran.output;
  const auto json = nlohmann::json::parse(ran.output);
  EXPECT_TRUE(json.at("values_in_keys"));
  // Keys, and 8 window queries of 128 heads.
  EXPECT_EQ(json.at("input_bytes"), 3 * (300 + 8 * 128) * 576 * 2);
  const Ran text = RunCommand(
      "bench --in-process --geometry tiny-llama --values-in-keys --value-dim 64 --tokens 300");
  EXPECT_NE(text.code, 0);
  EXPECT_THAT(text.output, HasSubstr("value_dim: 64 is above key_dim, 32"));
}

TEST_F(BenchCommandTest, KnowsFp8) {
  const Ran ran = RunCommand(
      "bench --in-process --geometry tiny-llama --tokens 300 --prompts 1 --dtype f8-e4m3 "
      "--kv-scales per-kv-head --json");
  ASSERT_EQ(ran.code, 0) << ran.output;
  // Keys and values of 2 heads, 8 window queries of 6 heads in bf16, and two times two scales.
  EXPECT_EQ(nlohmann::json::parse(ran.output).at("input_bytes"),
            12 * (300 * 2 * 64 + 8 * 6 * 32 * 2 + 2 * 2 * 4));
  const Ran wide =
      RunCommand("bench --in-process --geometry tiny-llama --tokens 300 --kv-scales per-tensor");
  EXPECT_NE(wide.code, 0);
  EXPECT_THAT(wide.output, HasSubstr("open.kv_scales"));
}

TEST_F(BenchCommandTest, PagesTheSamePrompt) {
  const std::string bench =
      "bench --in-process --geometry tiny-llama --tokens 300 --prompts 1 --json";
  const Ran paged = RunCommand(bench + " --paged 64");
  ASSERT_EQ(paged.code, 0) << paged.output;
  const auto json = nlohmann::json::parse(paged.output);
  EXPECT_EQ(json.at("block_tokens"), 64);
  // Five blocks of keys and values of 2 heads, and 8 window queries of 6.
  EXPECT_EQ(json.at("input_bytes"), 12 * (5 * 64 * 2 * 64 * 2 + 8 * 6 * 32 * 2));
  const Ran odd = RunCommand(bench + " --paged 24");
  EXPECT_NE(odd.code, 0);
  EXPECT_THAT(odd.output, HasSubstr("open.paged.block_tokens: 24"));
  EXPECT_THAT(RunCommand("info --in-process").output, HasSubstr("16 to 4096 tokens"));
}

TEST_F(BenchCommandTest, RunsTheRanksOfAPromptTogether) {
  const std::string address = "unix:" + directory_.Path("socket");
  testkit::Process server({STRUCTKV_SERVER, "--listen", address});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  const std::string bench = "bench --geometry tiny-llama --tokens 500 --prompts 3 --json";
  const Ran whole = RunCommand(bench + " --server " + address);
  ASSERT_EQ(whole.code, 0) << whole.output;
  // 6 query and 2 KV heads: with 6 ranks three share a KV head and its 2 x 500 rows.
  for (const auto& [shards, copies] : {std::pair(2, 1), std::pair(6, 3)}) {
    const Ran ran =
        RunCommand(bench + " --server " + address + " --shards " + std::to_string(shards));
    ASSERT_EQ(ran.code, 0) << ran.output;
    const auto one = nlohmann::json::parse(whole.output);
    const auto many = nlohmann::json::parse(ran.output);
    EXPECT_EQ(many.at("shards"), shards);
    // Keys and values of 12 layers, 3 prompts; window queries are not copied.
    const int64_t rows = int64_t{3} * 12 * 2 * 500 * (32 + 32) * 2;
    EXPECT_EQ(many.at("input_bytes").get<int64_t>() - one.at("input_bytes").get<int64_t>(),
              (copies - 1) * rows);
  }
  const Ran fp8 = RunCommand(bench + " --server " + address +
                             " --shards 2 --dtype f8-e4m3 --kv-scales per-kv-head");
  EXPECT_EQ(fp8.code, 0) << fp8.output;
  const Ran alone = RunCommand(bench + " --in-process --shards 2");
  EXPECT_NE(alone.code, 0);
  EXPECT_THAT(alone.output, HasSubstr("--shards needs a server"));
}

TEST_F(BenchCommandTest, RunsSeveralPromptsInOneStream) {
  const std::string address = "unix:" + directory_.Path("socket");
  testkit::Process server({STRUCTKV_SERVER, "--listen", address});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  const std::string bench = "bench --geometry tiny-llama --tokens 500 --prompts 7 --batch 3";
  const Ran ran = RunCommand(bench + " --json --concurrency 2 --server " + address);
  ASSERT_EQ(ran.code, 0) << ran.output;
  const auto json = nlohmann::json::parse(ran.output);
  EXPECT_EQ(json.at("batch"), 3);
  const auto tokens = json.at("batch_tokens").get<std::vector<int64_t>>();
  ASSERT_EQ(tokens.size(), 3U);
  EXPECT_EQ(tokens[0], 500);
  for (const int64_t each : tokens) {
    EXPECT_GE(each, 125);
    EXPECT_LE(each, 500);
  }
  EXPECT_NE(tokens[1], tokens[2]);
  // Two streams of three prompts and one of one: keys and values, and 8 window queries of 6 heads.
  int64_t rows = 0;
  for (const int64_t each : {tokens[0] * 3, tokens[1] * 2, tokens[2] * 2}) rows += each;
  EXPECT_EQ(json.at("input_bytes"), 12 * (rows * 2 * 64 * 2 + 7 * 8 * 6 * 32 * 2));
  const Ran text = RunCommand(bench + " --pull --server " + address);
  ASSERT_EQ(text.code, 0) << text.output;
  EXPECT_THAT(text.output, HasSubstr("7 prompts, 3 at a time, streams of 3"));
  const Ran few = RunCommand(
      "bench --geometry tiny-llama --tokens 500 --prompts 2 --batch 3 --concurrency 4 --server " +
      address);
  ASSERT_EQ(few.code, 0) << few.output;
  EXPECT_THAT(few.output, HasSubstr("2 prompts, 2 at a time, streams of 2"));
  const Ran other = RunCommand(bench + " --json --seed 2 --server " + address);
  ASSERT_EQ(other.code, 0) << other.output;
  EXPECT_NE(nlohmann::json::parse(other.output).at("batch_tokens"), json.at("batch_tokens"));

  const Ran alone = RunCommand(bench + " --in-process");
  EXPECT_NE(alone.code, 0);
  EXPECT_THAT(alone.output, HasSubstr("--batch needs a server"));
  const Ran ranks = RunCommand(bench + " --shards 2 --server " + address);
  EXPECT_NE(ranks.code, 0);
  EXPECT_THAT(ranks.output, HasSubstr("--batch 3 and --shards 2"));
}

TEST_F(BenchCommandTest, HoldsAndFetches) {
  const std::string address = "unix:" + directory_.Path("socket");
  testkit::Process server({STRUCTKV_SERVER, "--listen", address, "--hold-budget", "64MiB",
                           "--region-socket", directory_.Path("regions")});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  const std::string bench =
      "bench --geometry tiny-llama --tokens 500 --prompts 4 --hold --json --server " + address;
  // Positions, and rows of 2 heads of 32 in bf16, of 50 tokens in 12 layers.
  constexpr int64_t kCache = 12 * 50 * (4 + 2 * 2 * 32 * 2);
  for (const auto& [flags, caches] :
       std::vector<std::pair<std::string, int64_t>>{{" --transport inline", 4},
                                                    {" --transport shm", 4},
                                                    {" --concurrency 2", 4},
                                                    {" --shards 2", 4},
                                                    {" --pull", 4}}) {
    const Ran ran = RunCommand(bench + flags);
    ASSERT_EQ(ran.code, 0) << flags << ran.output;
    const auto json = nlohmann::json::parse(ran.output);
    EXPECT_TRUE(json.at("hold"));
    // Positions, of each pull too, and the skeleton; each rank has both.
    const int64_t pulled = flags == " --pull" ? 12 * 50 : 0;
    EXPECT_EQ(json.at("output_bytes").get<int64_t>(),
              (flags == " --shards 2" ? 2 : 1) * 4 * 4 * (12 * 50 + pulled + 100))
        << flags;
    const int64_t ranks = flags == " --shards 2" ? 4 * 12 * 50 * 4 : 0;  // each has positions
    EXPECT_EQ(json.at("fetch_bytes").get<int64_t>(), caches * kCache + ranks) << flags;
    EXPECT_EQ(json.at("fetch_transport"),
              flags == " --transport inline" ? "inline" : "shared_memory")
        << flags;
    EXPECT_GT(json.at("fetch_bytes_per_second").get<double>(), 0);
    EXPECT_GT(json.at("fetch_seconds").at("p99").get<double>(), 0);
    EXPECT_EQ(json.contains("fetch_cpu_seconds_per_gb"), flags != " --concurrency 2");
  }
  const Ran batch = RunCommand(bench + " --batch 2");
  ASSERT_EQ(batch.code, 0) << batch.output;
  const Ran alone = RunCommand("bench --hold --in-process");
  EXPECT_NE(alone.code, 0);
  EXPECT_THAT(alone.output, HasSubstr("--hold needs a server"));
}

TEST_F(BenchCommandTest, RefusesAStatisticThatTheMethodCannotTake) {
  const std::string bench = "bench --geometry tiny-llama --tokens 100 --prompts 1 --in-process ";
  for (const auto& [flags, refusal] : std::vector<std::pair<std::string, std::string>>{
           {"--method full --statistic saliency", "--statistic saliency: full scores nothing"},
           {"--method h2o --statistic window-queries",
            "--statistic window-queries: h2o needs saliency or saliency-per-kv-head"}}) {
    const Ran ran = RunCommand(bench + flags);
    EXPECT_NE(ran.code, 0) << flags;
    EXPECT_THAT(ran.output, HasSubstr(refusal));
  }
  for (const char* flags : {"--method h2o", "--method full", "--statistic saliency"}) {
    EXPECT_EQ(RunCommand(bench + flags).code, 0) << flags;
  }
}

}  // namespace
}  // namespace structkv::cli
