#include "tests/testing/lost_backend.h"

#include <unistd.h>

#include <csignal>
#include <thread>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "service/serve_loop.h"

namespace structkv::testkit {

void ExpectEndsAsLost(Server* server, absl::FunctionRef<void()> lose, const std::string& cause,
                      const std::vector<int>& signals) {
  int log_pipe[2];
  ASSERT_EQ(pipe(log_pipe), 0);
  rpc::Log log(rpc::LogFormat::kText, log_pipe[1]);
  sigset_t awaited;
  sigemptyset(&awaited);
  for (const int signal : signals) sigaddset(&awaited, signal);
  const absl::Time begin = absl::Now();
  std::thread loser(lose);
  const ServeEnd end = ServeUntilEnd(server, awaited, {}, &log);
  loser.join();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  EXPECT_EQ(end.exit_code, 1);
  EXPECT_TRUE(end.at_once);
  ASSERT_TRUE(log.Flush(absl::Seconds(30)));
  close(log_pipe[1]);
  char line[4096] = {};
  EXPECT_GT(read(log_pipe[0], line, sizeof(line) - 1), 0);
  close(log_pipe[0]);
  EXPECT_THAT(line,
              ::testing::AllOf(::testing::HasSubstr("backend_lost"), ::testing::HasSubstr(cause)));
}

}  // namespace structkv::testkit
