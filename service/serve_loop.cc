#include "service/serve_loop.h"

#include <pthread.h>

#include <ctime>
#include <string>

#include "service/session/session.h"

namespace structkv {
namespace {

// How often the backend is asked how it is.
constexpr timespec kLook = {0, 250'000'000};
// How long callers may take to be told that the backend is lost.
constexpr absl::Duration kTellLimit = absl::Seconds(2);

ServeEnd Drain(Server* server, int signal, absl::Duration limit, rpc::Log* log) {
  log->Write("draining", {{"signal", signal == SIGTERM ? "SIGTERM" : "SIGINT"},
                          {"streams", server->active_streams()},
                          {"limit_ms", absl::ToInt64Milliseconds(limit)}});
  const bool finished = server->Drain(limit);
  log->Write("stopped",
             {{"streams_cut", finished ? "none" : "some"}, {"log_lines_dropped", log->dropped()}});
  return {};
}

}  // namespace

ServeEnd ServeUntilEnd(Server* server, const sigset_t& signals, absl::Duration drain_limit,
                       rpc::Log* log) {
  while (true) {
    if (const int signal = sigtimedwait(&signals, nullptr, &kLook); signal > 0) {
      // A second signal ends the process as it would any other.
      pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
      return Drain(server, signal, drain_limit, log);
    }
    const absl::Status health = server->sessions().backend().Health();
    if (health.ok()) continue;
    const std::string error(health.message());
    log->Write("backend_lost", {{"error", error}, {"streams", server->active_streams()}});
    server->FailAll(health, kTellLimit);
    return {.exit_code = 1, .at_once = true};
  }
}

}  // namespace structkv
