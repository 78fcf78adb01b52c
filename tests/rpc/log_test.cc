#include "service/rpc/log.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace structkv::rpc {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

class LogTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(pipe2(ends_, O_CLOEXEC), 0);
    ASSERT_GE(fcntl(ends_[1], F_SETPIPE_SZ, 4096), 4096);
  }
  ~LogTest() override {
    for (const int end : ends_) {
      if (end >= 0) close(end);
    }
  }
  void CloseReader() {
    close(ends_[0]);
    ends_[0] = -1;
  }
  // What comes until `lines` have.
  std::vector<std::string> Read(size_t lines) {
    std::string text;
    size_t ends = 0;
    char buffer[4096];
    while (ends < lines) {
      const ssize_t count = read(ends_[0], buffer, sizeof(buffer));
      if (count <= 0) break;
      for (ssize_t i = 0; i < count; ++i) ends += buffer[i] == '\n' ? 1 : 0;
      text.append(buffer, static_cast<size_t>(count));
    }
    std::vector<std::string> read = absl::StrSplit(text, '\n', absl::SkipEmpty());
    return read;
  }

  int ends_[2] = {-1, -1};
};

TEST_F(LogTest, LinesOfText) {
  Log log(LogFormat::kText, ends_[1]);
  log.Write("session", {{"id", "a-1"}, {"micros", 12}, {"error", "no \"room\"\n"}});
  ASSERT_TRUE(log.Flush(absl::Seconds(30)));
  const auto lines = Read(1);
  ASSERT_EQ(lines.size(), 1U);
  EXPECT_THAT(lines[0], HasSubstr("Z session id=a-1 micros=12 error=\"no \\\"room\\\"\\n\""));
}

TEST_F(LogTest, LinesOfJson) {
  Log log(LogFormat::kJson, ends_[1]);
  log.Write("session", {{"id", "\xff"}, {"micros", 12}});
  ASSERT_TRUE(log.Flush(absl::Seconds(30)));
  EXPECT_THAT(Read(1).at(0),
              HasSubstr("\"event\":\"session\",\"id\":\"\xef\xbf\xbd\",\"micros\":12}"));
}

// -1: there is none.
int NumberOf(const std::string& line) {
  int number = -1;
  const size_t at = line.find("number=");
  if (at != std::string::npos) std::sscanf(line.c_str() + at, "number=%d", &number);
  return number;
}

// A reader that stands still holds up nobody. What has no room is dropped, and the rest comes in
// order once it reads on.
TEST_F(LogTest, AReaderThatStandsStill) {
  Log log(LogFormat::kText, ends_[1]);
  const std::string filling(1000, 'x');
  constexpr int kLines = 3000;
  for (int64_t i = 0; i < kLines; ++i) log.Write("line", {{"number", i}, {"filling", filling}});
  EXPECT_FALSE(log.Flush(absl::Milliseconds(50)));
  const int64_t dropped = log.dropped();
  // About 1 MiB waits, and 4 KiB are in the pipe.
  EXPECT_GT(dropped, kLines / 2);
  EXPECT_LT(dropped, kLines - 900);
  const std::vector<std::string> lines = Read(static_cast<size_t>(kLines - dropped));
  ASSERT_EQ(lines.size(), static_cast<size_t>(kLines - dropped));
  int last = -1;
  for (const std::string& line : lines) {
    const int number = NumberOf(line);
    ASSERT_GT(number, last) << line;
    last = number;
  }
  EXPECT_TRUE(log.Flush(absl::Seconds(30)));
  EXPECT_EQ(log.dropped(), dropped);
  // There is room again.
  log.Write("line", {{"number", kLines}});
  EXPECT_THAT(Read(1).at(0), HasSubstr("line number=3000"));
}

// The end waits for a second, and leaves the thread behind.
TEST_F(LogTest, EndsWhileItsReaderStandsStill) {
  {
    Log log(LogFormat::kText, ends_[1]);
    const std::string filling(1200, 'x');
    for (int64_t i = 0; i < 20; ++i) log.Write("line", {{"number", i}, {"filling", filling}});
  }
  // The three that are in the pipe, and the one that it had begun.
  EXPECT_THAT(Read(4), SizeIs(4));
  pollfd more = {.fd = ends_[0], .events = POLLIN, .revents = 0};
  EXPECT_EQ(poll(&more, 1, 100), 0);
}

TEST_F(LogTest, AReaderThatIsGone) {
  signal(SIGPIPE, SIG_IGN);
  CloseReader();
  Log log(LogFormat::kText, ends_[1]);
  log.Write("line", {});
  EXPECT_TRUE(log.Flush(absl::Seconds(30)));
  EXPECT_EQ(log.dropped(), 1);
}

// What is longer than the pipe is written piece by piece.
TEST_F(LogTest, ALongLineThroughADescriptorThatDoesNotBlock) {
  ASSERT_EQ(fcntl(ends_[1], F_SETFL, O_NONBLOCK), 0);
  Log log(LogFormat::kText, ends_[1]);
  log.Write("line", {{"filling", std::string(20'000, 'x')}, {"number", 1}});
  log.Write("line", {{"number", 2}});
  const std::vector<std::string> lines = Read(2);
  ASSERT_THAT(lines, SizeIs(2));
  EXPECT_THAT(lines[0], HasSubstr("x number=1"));
  EXPECT_EQ(NumberOf(lines[1]), 2);
  EXPECT_EQ(log.dropped(), 0);
}

// Signals are for the program's own threads: one that ends the process would, by way of this one.
TEST_F(LogTest, ItsThreadTakesNoSignals) {
  const auto threads = [] {
    std::set<std::string> all;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
      all.insert(entry.path());
    }
    return all;
  };
  const std::set<std::string> before = threads();
  Log log(LogFormat::kText, ends_[1]);
  std::vector<uint64_t> blocked;
  for (const std::string& thread : threads()) {
    if (before.count(thread) > 0) continue;
    std::ifstream status(thread + "/status");
    for (std::string line; std::getline(status, line);) {
      if (absl::StartsWith(line, "SigBlk:"))
        blocked.push_back(std::stoull(line.substr(7), nullptr, 16));
    }
  }
  ASSERT_THAT(blocked, SizeIs(1));
  for (const int signal : {SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGCHLD}) {
    EXPECT_TRUE((blocked[0] >> (signal - 1)) & 1) << signal;
  }
}

// Whoever shares the descriptor may have made it one that does not block.
TEST_F(LogTest, ADescriptorThatDoesNotBlock) {
  ASSERT_EQ(fcntl(ends_[1], F_SETFL, O_NONBLOCK), 0);
  Log log(LogFormat::kText, ends_[1]);
  const std::string filling(1000, 'x');
  for (int64_t i = 0; i < 100; ++i) log.Write("line", {{"number", i}, {"filling", filling}});
  EXPECT_EQ(Read(100).size(), 100U);
  EXPECT_EQ(log.dropped(), 0);
}

TEST_F(LogTest, LinesOfManyThreadsAreWhole) {
  Log log(LogFormat::kText, ends_[1]);
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&log, t] {
      for (int64_t i = 0; i < 100; ++i) log.Write("line", {{"thread", t}, {"number", i}});
    });
  }
  const std::vector<std::string> lines = Read(400);
  for (std::thread& thread : threads) thread.join();
  ASSERT_EQ(lines.size(), 400U);
  std::vector<int> next(4, 0);
  for (const std::string& line : lines) {
    int thread = -1;
    const size_t at = line.find("line ");
    ASSERT_NE(at, std::string::npos) << line;
    ASSERT_EQ(std::sscanf(line.c_str() + at, "line thread=%d", &thread), 1);
    EXPECT_EQ(NumberOf(line), next.at(static_cast<size_t>(thread))++);
  }
}

}  // namespace
}  // namespace structkv::rpc
