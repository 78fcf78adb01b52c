// The server as a process of its own: what it gives back to the system, and what must not end it.
#include "tests/testing/process.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/call.h"
#include "tests/testing/prompt_data.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using Messages = std::vector<v1::CompressRequest>;

class ProcessTest : public ::testing::Test {
 protected:
  std::string Address(const std::string& name = "socket") {
    return "unix:" + directory_.Path(name);
  }

  TemporaryDirectory directory_;
};

// One stream on a connection of its own, ended as `end` says.
grpc::StatusCode RunOnce(const std::string& address, const Messages& messages, bool cancel) {
  Call call(NewChannel(address));
  for (const v1::CompressRequest& message : messages) call.Send(message);
  if (cancel) {
    call.WaitForOpened();
    call.Cancel();
  } else {
    call.HalfClose();
  }
  return call.Finish().status.error_code();
}

// --check-config finds whatever the start would.
TEST_F(ProcessTest, CheckConfigComparesOptionsToo) {
  const auto check = [](const std::vector<std::string>& flags) {
    std::vector<std::string> command = {STRUCTKV_SERVER, "--check-config"};
    command.insert(command.end(), flags.begin(), flags.end());
    Process server(command);
    const int code = server.Wait().value_or(-1);
    return std::pair(code, server.output() + server.error());
  };
  EXPECT_EQ(check({"--hold-lease", "10s", "--max-hold-lease", "10s"}).first, 0);
  const auto [code, text] = check({"--hold-lease", "20s", "--max-hold-lease", "10s"});
  EXPECT_EQ(code, 1);
  EXPECT_EQ(text, "structkv-server: hold-lease is 20s; 1ms to max-hold-lease (10s) are allowed\n");
  EXPECT_EQ(check({"--region-lease", "20s", "--region-lease-limit", "10s"}).first, 1);
  EXPECT_EQ(check({"--nccl-library", "libnccl.so.2", "--nccl-memory", "1GiB"}).first, 0);
  EXPECT_EQ(check({"--nccl-memory", "1GiB"}),
            std::pair(1, std::string("structkv-server: nccl-memory is 1073741824 bytes, and there "
                                     "is no nccl-library that would use them\n")));
}

// Each named region takes a descriptor: the soft limit of a shell is raised to the hard one.
TEST_F(ProcessTest, RaisesTheLimitOfDescriptors) {
  Process server({"/bin/sh", "-c",
                  absl::StrCat("ulimit -Sn 64; exec ", STRUCTKV_SERVER, " --listen ", Address())});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  rlimit files = {};
  ASSERT_EQ(prlimit(server.pid(), RLIMIT_NOFILE, nullptr, &files), 0);
  EXPECT_EQ(files.rlim_cur, files.rlim_max);
  EXPECT_GT(files.rlim_cur, 64U);
}

// Every way for a stream of 6 MB to end, again and again: the process has neither more memory nor
// more descriptors than after the first rounds.
TEST_F(ProcessTest, MemoryAndDescriptorsComeBack) {
  Process server({STRUCTKV_SERVER, "--listen", Address(), "--log-sessions", "false"});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  const PromptData data(SmallOpen(6000), 1);
  const Messages all = AllMessages(data);
  const Messages half(all.begin(), all.begin() + all.size() / 2);
  Messages bad_piece = half;
  bad_piece.push_back(PieceMessage(MakePiece(data, 0, v1::TENSOR_KEYS, 64, 64)));
  Messages bad_commit = all;
  bad_commit.back() = CommitMessage(data.layers(), 1);
  v1::Open bad_open = data.open();
  bad_open.set_prompt_tokens(0);
  const auto round = [&] {
    EXPECT_EQ(RunOnce(Address(), all, false), grpc::StatusCode::OK);
    EXPECT_EQ(RunOnce(Address(), half, false), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(RunOnce(Address(), half, true), grpc::StatusCode::CANCELLED);
    EXPECT_EQ(RunOnce(Address(), bad_piece, false), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(RunOnce(Address(), bad_commit, false), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(RunOnce(Address(), {OpenMessage(bad_open)}, false),
              grpc::StatusCode::INVALID_ARGUMENT);
  };
  for (int i = 0; i < 10; ++i) round();
  const int64_t memory = StatusBytes(server.pid(), "VmRSS");
  const int64_t files = OpenFiles(server.pid());
  for (int i = 0; i < 40; ++i) round();
  // A session that stayed would cost its share of 6 MB, and there were 240.
  EXPECT_LT(StatusBytes(server.pid(), "VmRSS"), memory + (int64_t{16} << 20));
  EXPECT_TRUE(Eventually([&] { return OpenFiles(server.pid()) <= files; }))
      << OpenFiles(server.pid()) << " files, " << files << " before";
}

TEST_F(ProcessTest, ASecondServerLeavesTheFirstItsSocket) {
  Process first({STRUCTKV_SERVER, "--listen", Address()});
  ASSERT_TRUE(first.WaitForLine("ready")) << first.error();
  Process second({STRUCTKV_SERVER, "--listen", Address()});
  EXPECT_EQ(second.Wait(), 1);
  EXPECT_THAT(second.error(), ::testing::HasSubstr(Address()));
  const PromptData data(SmallOpen(), 1);
  EXPECT_EQ(RunOnce(Address(), AllMessages(data), false), grpc::StatusCode::OK);
}

// A socket that a killed server left behind is no hindrance.
TEST_F(ProcessTest, AServerTakesADeadOnesSocket) {
  {
    Process killed({STRUCTKV_SERVER, "--listen", Address()});
    ASSERT_TRUE(killed.WaitForLine("ready")) << killed.error();
    killed.Signal(SIGKILL);
    killed.Wait();
  }
  Process next({STRUCTKV_SERVER, "--listen", Address()});
  EXPECT_TRUE(next.WaitForLine("ready")) << next.error();
}

// A server whose log goes into a pipe, of which the first byte is read.
class LoggingServer {
 public:
  explicit LoggingServer(const std::string& address) {
    int ends[2];
    EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0);
    EXPECT_GE(fcntl(ends[1], F_SETPIPE_SZ, 4096), 4096);
    process_ = fork();
    if (process_ == 0) {
      dup2(ends[1], STDERR_FILENO);
      execl(STRUCTKV_SERVER, STRUCTKV_SERVER, "--listen", address.c_str(), nullptr);
      _exit(127);
    }
    close(ends[1]);
    reader_ = ends[0];
    char ready = 0;
    EXPECT_EQ(read(reader_, &ready, 1), 1);  // its first line
  }
  ~LoggingServer() { CloseReader(); }

  void CloseReader() {
    if (reader_ >= 0) close(std::exchange(reader_, -1));
  }
  // Asks it to end, and says how it did: as of waitpid().
  int Terminate() const {
    kill(process_, SIGTERM);
    int status = 0;
    EXPECT_EQ(waitpid(process_, &status, 0), process_);
    return status;
  }

 private:
  pid_t process_ = -1;
  int reader_ = -1;
};

TEST_F(ProcessTest, ServesOnWithoutAReaderOfItsLog) {
  LoggingServer server(Address());
  server.CloseReader();
  const PromptData data(SmallOpen(), 1);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(RunOnce(Address(), AllMessages(data), false), grpc::StatusCode::OK);
  }
  const int status = server.Terminate();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

// Prompts, probes and the end do not wait for whoever reads the log.
TEST_F(ProcessTest, ServesOnWhileTheReaderOfItsLogStandsStill) {
  const LoggingServer server(Address());
  const PromptData data(SmallOpen(), 1);
  // Their lines, of 200 bytes and more, are twice what the pipe holds.
  for (int i = 0; i < 40; ++i) {
    EXPECT_EQ(RunOnce(Address(), AllMessages(data), false), grpc::StatusCode::OK);
  }
  const int status = server.Terminate();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST_F(ProcessTest, StartsWithoutTheNcclThatItWasToldToOffer) {
  Process server({STRUCTKV_SERVER, "--listen", Address(), "--backend", "cpu", "--nccl-library",
                  "libnccl.so.2"});
  ASSERT_TRUE(server.WaitForLine("ready")) << server.error();
  EXPECT_THAT(server.error(), ::testing::HasSubstr("the backend cpu computes on no GPU"));
  const PromptData data(SmallOpen(), 1);
  EXPECT_EQ(RunOnce(Address(), AllMessages(data), false), grpc::StatusCode::OK);
}

// Built with CUDA or not, there is a GPU or none that it may see: it serves, and says with what.
TEST_F(ProcessTest, WithoutAGpuTheCpuServes) {
  Process server({"/usr/bin/env", "CUDA_VISIBLE_DEVICES=", STRUCTKV_SERVER, "--listen", Address()});
  const std::optional<std::string> ready = server.WaitForLine("ready");
  ASSERT_TRUE(ready.has_value()) << server.error();
  EXPECT_THAT(*ready, ::testing::HasSubstr("backend=cpu"));
  EXPECT_THAT(*ready,
              ::testing::HasSubstr(STRUCTKV_HAVE_CUDA ? "\"no CUDA device: cudaGetDeviceCount: "
                                                      : "\"built without CUDA; "));
  EXPECT_THAT(*ready, ::testing::HasSubstr("; serving with cpu\""));
  const PromptData data(SmallOpen(), 1);
  EXPECT_EQ(RunOnce(Address(), AllMessages(data), false), grpc::StatusCode::OK);
}

TEST_F(ProcessTest, WithoutAGpuCudaIsRefusedAtOnce) {
  Process server({"/usr/bin/env", "CUDA_VISIBLE_DEVICES=", STRUCTKV_SERVER, "--listen", Address(),
                  "--backend", "cuda"});
  EXPECT_EQ(server.Wait(), STRUCTKV_HAVE_CUDA ? 1 : 2);
  EXPECT_THAT(server.error(),
              ::testing::HasSubstr(STRUCTKV_HAVE_CUDA ? "backend cuda: no CUDA device: "
                                                      : "cuda not in {auto,cpu,reference}"));
  EXPECT_EQ(std::count(server.error().begin(), server.error().end(), '\n'), 1) << server.error();
}

}  // namespace
}  // namespace structkv::testkit
