// --transport of `structkv compress`, `fetch` and `bench`, with a real server.
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/cli/run_command.h"
#include "tests/testing/process.h"

namespace structkv::cli {
namespace {

using ::testing::HasSubstr;

constexpr char kCapture[] = STRUCTKV_TEST_DATA "/capture-tiny-llama-1000.safetensors";

std::string Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

class TransportCommandTest : public CommandTest {
 protected:
  void Start(bool regions) {
    std::vector<std::string> command = {STRUCTKV_SERVER, "--listen", address_};
    if (regions) {
      command.insert(command.end(), {"--region-socket", directory_.Path("regions")});
      command.insert(command.end(), {"--hold-budget", "64MiB"});
    }
    server_ = std::make_unique<testkit::Process>(command);
    ASSERT_TRUE(server_->WaitForLine("ready")) << server_->error();
  }

  // What `compress` prints, and the file that it writes.
  std::pair<nlohmann::json, std::string> Compress(const std::string& flags) {
    const std::string out = directory_.Path("out.safetensors");
    const Ran ran = RunCommand(std::string("compress ") + kCapture + " --json --server " +
                               address_ + " --out " + out + " " + flags);
    EXPECT_EQ(ran.code, 0) << ran.output;
    return {nlohmann::json::parse(ran.output), Read(out)};
  }

  const std::string address_ = "unix:" + directory_.Path("socket");
  std::unique_ptr<testkit::Process> server_;
};

TEST_F(TransportCommandTest, CompressesTheSameOverEach) {
  Start(/*regions=*/true);
  for (const std::string more : {"", "--pull", "--plan", "--pivot online --skeleton-layers"}) {
    SCOPED_TRACE(more);
    const auto [json, file] = Compress(more + " --transport inline");
    EXPECT_EQ(json.at("transport"), "inline");
    EXPECT_FALSE(file.empty());
    for (const std::string transport : {"", "--transport shm"}) {
      const auto [shared, same] = Compress(more + " " + transport);
      EXPECT_EQ(shared.at("transport"), "shared_memory");
      EXPECT_TRUE(same == file);
    }
  }
}

TEST_F(TransportCommandTest, FetchesTheSameOverEach) {
  Start(/*regions=*/true);
  const Ran held =
      RunCommand(std::string("compress ") + kCapture + " --hold --json --server " + address_);
  ASSERT_EQ(held.code, 0) << held.output;
  const std::string handle = nlohmann::json::parse(held.output).at("handle");
  std::string expected;
  for (const std::string transport : {"inline", "shm", "auto"}) {
    const std::string out = directory_.Path("fetched.safetensors");
    const Ran ran = RunCommand("fetch " + handle + " --json --server " + address_ + " --to " + out +
                               " --kv-heads 1 --transport " + transport);
    ASSERT_EQ(ran.code, 0) << ran.output;
    const nlohmann::json json = nlohmann::json::parse(ran.output);
    EXPECT_EQ(json.at("transport"), transport == "inline" ? "inline" : "shared_memory");
    if (expected.empty()) expected = Read(out);
    EXPECT_TRUE(Read(out) == expected);
  }
  EXPECT_EQ(RunCommand("release " + handle + " --server " + address_).code, 0);
}

TEST_F(TransportCommandTest, AutoSaysWhyNotSharedMemory) {
  Start(/*regions=*/false);
  const auto [json, file] = Compress("");
  EXPECT_EQ(json.at("transport"), "inline");
  EXPECT_THAT(json.at("transport_reason").get<std::string>(),
              HasSubstr("the server has no shared memory"));
  const Ran refused =
      RunCommand(std::string("compress ") + kCapture + " --transport shm --server " + address_ +
                 " --out " + directory_.Path("none"));
  EXPECT_NE(refused.code, 0);
  EXPECT_THAT(refused.output, HasSubstr("the server has no shared memory"));
}

TEST_F(TransportCommandTest, BenchesOverSharedMemory) {
  Start(/*regions=*/true);
  for (const std::string more :
       {"--concurrency 2", "--batch 2", "--shards 2", "--pull", "--paged 16"}) {
    const Ran ran = RunCommand(
        "bench --geometry tiny-llama --tokens 500 --prompts 4 --json --transport shm --server " +
        address_ + " " + more);
    ASSERT_EQ(ran.code, 0) << more << ": " << ran.output;
    EXPECT_EQ(nlohmann::json::parse(ran.output).at("transport"), "shared_memory") << more;
  }
}

TEST_F(TransportCommandTest, SaysWhatAGpuIsMissing) {
  Start(/*regions=*/true);
  const std::string where = " --server " + address_ + " --cuda-library libno-such-cuda.so.1" +
                            " --nccl-library libno-such-nccl.so.2 --transport ";
  for (const std::string& command :
       {std::string("bench --geometry tiny-llama --tokens 500 --prompts 1"),
        std::string("compress ") + kCapture + " --out " + directory_.Path("none")}) {
    const Ran ipc = RunCommand(command + where + "cuda_ipc");
    EXPECT_NE(ipc.code, 0);
    EXPECT_THAT(ipc.output, HasSubstr("no CUDA driver: libno-such-cuda.so.1: "));
    const Ran nccl = RunCommand(command + where + "nccl");
    EXPECT_NE(nccl.code, 0);
    EXPECT_THAT(nccl.output, HasSubstr("no NCCL: libno-such-nccl.so.2: "));
  }
}

}  // namespace
}  // namespace structkv::cli
