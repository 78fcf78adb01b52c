// `structkv compress`, `fetch` and `bench` by NCCL, between two processes: the command and a
// server, both on the fake CUDA runtime and the fake library.
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/cli/run_command.h"
#include "tests/testing/process.h"

namespace structkv::cli {
namespace {

using ::testing::HasSubstr;

constexpr char kCapture[] = STRUCTKV_TEST_DATA "/capture-tiny-llama-1000.safetensors";
// Not the server's GPU, which is the first one.
constexpr char kByNccl[] =
    " --transport nccl --gpu 1 --cuda-library '' --nccl-library " STRUCTKV_FAKE_NCCL;

class NcclCommandTest : public CommandTest {
 protected:
  void TearDown() override {
    server_.Signal(SIGTERM);
    EXPECT_EQ(server_.Wait(), 0) << server_.error();
    EXPECT_THAT(server_.error(), HasSubstr("transport=nccl"));
  }

  std::string Path(const std::string& name) const { return directory_.Path(name); }
  std::string Server() const { return " --server " + address_; }
  static nlohmann::json Json(const std::string& arguments) {
    const Ran ran = RunCommand(arguments + " --json");
    EXPECT_EQ(ran.code, 0) << ran.output;
    return nlohmann::json::parse(ran.output, nullptr, /*allow_exceptions=*/false);
  }
  static std::string Read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::string Hold(const std::string& flags = "") {
    return Json(std::string("compress ") + kCapture + " --hold" + Server() + flags).at("handle");
  }

  const std::string address_ = "unix:" + directory_.Path("socket");
  testkit::Process server_{{STRUCTKV_GPU_SERVER, "--listen", address_, "--device-memory", "192MiB",
                            "--hold-budget", "64MiB", "--nccl-library", STRUCTKV_FAKE_NCCL,
                            "--nccl-memory", "64MiB"}};
  const std::optional<std::string> listens_ = server_.WaitForLine("listening on ");
};

TEST_F(NcclCommandTest, CompressesAndFetchesTheSame) {
  ASSERT_TRUE(listens_.has_value()) << server_.error();
  const std::string compress = std::string("compress ") + kCapture + Server() + " --out ";
  Json(compress + Path("inline"));
  EXPECT_EQ(Json(compress + Path("nccl") + kByNccl).at("transport"), "nccl");
  EXPECT_FALSE(Read(Path("inline")).empty());
  EXPECT_TRUE(Read(Path("nccl")) == Read(Path("inline")));
  const std::string handle = Hold(kByNccl);
  for (const std::string& range : {std::string(), std::string(" --layers 1 --kv-heads 1")}) {
    const std::string fetch = "fetch " + handle + Server() + range + " --to ";
    Json(fetch + Path("inline"));
    const nlohmann::json json = Json(fetch + Path("nccl") + kByNccl);
    EXPECT_EQ(json.at("transport"), "nccl");
    EXPECT_TRUE(Read(Path("nccl")) == Read(Path("inline")));
  }
  EXPECT_EQ(RunCommand("release " + handle + Server()).code, 0);
}

TEST_F(NcclCommandTest, BenchesHolds) {
  ASSERT_TRUE(listens_.has_value()) << server_.error();
  const nlohmann::json json =
      Json("bench --hold --geometry tiny-llama --tokens 500 --prompts 2 --concurrency 2" +
           Server() + kByNccl);
  EXPECT_EQ(json.at("transport"), "nccl");
  EXPECT_EQ(json.at("fetch_transport"), "nccl");
}

// Killed in mid-transfer it leaves nothing behind, and others go on.
TEST_F(NcclCommandTest, IsKilledInMidTransfer) {
  ASSERT_TRUE(listens_.has_value()) << server_.error();
  const std::string handle = Hold();
  Json("fetch " + handle + Server() + " --to " + Path("inline"));
  const int64_t files = testkit::OpenFiles(server_.pid());
  for (const std::string& command :
       {"fetch " + handle + " --to " + Path("killed"),
        std::string("compress ") + kCapture + " --out " + Path("killed")}) {
    SCOPED_TRACE(command);
    setenv("FAKE_NCCL_FAULT", "hang", 1);
    testkit::Process client(
        {"/bin/sh", "-c",
         std::string("exec " STRUCTKV_COMMAND " ") + command + Server() + kByNccl});
    unsetenv("FAKE_NCCL_FAULT");
    // Its control stream, and its end of the communicator, which hangs in the first transfer.
    EXPECT_TRUE(testkit::Eventually([&] { return testkit::OpenFiles(server_.pid()) >= files + 2; },
                                    std::chrono::seconds(60)));
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    client.Signal(SIGKILL);
    EXPECT_EQ(client.Wait(), 128 + SIGKILL) << client.output() << client.error();
    EXPECT_TRUE(testkit::Eventually([&] { return testkit::OpenFiles(server_.pid()) <= files; },
                                    std::chrono::seconds(60)))
        << testkit::OpenFiles(server_.pid()) << " descriptors, there were " << files;
    const nlohmann::json json =
        Json("fetch " + handle + Server() + " --to " + Path("nccl") + kByNccl);
    EXPECT_EQ(json.at("transport"), "nccl");
    EXPECT_TRUE(Read(Path("nccl")) == Read(Path("inline")));
  }
  EXPECT_EQ(RunCommand("release " + handle + Server()).code, 0);
}

}  // namespace
}  // namespace structkv::cli
