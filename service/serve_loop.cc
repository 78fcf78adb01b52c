#include "service/serve_loop.h"

#include <pthread.h>

#include <ctime>
#include <string>
#include <utility>

#include "service/session/session.h"

namespace structkv {
namespace {

// How often the backend is asked how it is.
constexpr timespec kLook = {0, 250'000'000};
// How long callers may take to be told that the backend is lost.
constexpr absl::Duration kTellLimit = absl::Seconds(2);

ServeEnd EndLost(Server* server, const absl::Status& health, rpc::Log* log) {
  const std::string error(health.message());
  log->Write("backend_lost", {{"error", error}, {"streams", server->active_streams()}});
  server->FailAll(health, kTellLimit);
  return {.exit_code = 1, .at_once = true};
}

ServeEnd Drain(Server* server, int signal, absl::Duration limit, rpc::Log* log) {
  log->Write("draining", {{"signal", signal == SIGTERM ? "SIGTERM" : "SIGINT"},
                          {"streams", server->active_streams()},
                          {"held_caches", server->sessions().held_caches().count()},
                          {"limit_ms", absl::ToInt64Milliseconds(limit)}});
  bool first = true;
  const bool finished = server->Drain(limit, [&](const DrainProgress& left) {
    if (std::exchange(first, false)) return;  // "draining" says as much
    log->Write("drain_progress", {{"streams", left.streams},
                                  {"prompts", left.prompts},
                                  {"nccl_pairs", left.nccl_pairs},
                                  {"held_caches", left.held_caches},
                                  {"left_ms", absl::ToInt64Milliseconds(left.left)}});
  });
  // Of one that is lost after the last stream nobody has missed anything.
  const absl::Status health = server->sessions().backend().Health();
  if (!finished && !health.ok()) return EndLost(server, health, log);
  log->Write("stopped", {{"streams_cut", finished ? "none" : "some"},
                         {"held_caches_lost", server->sessions().held_caches().count()},
                         {"log_lines_dropped", log->dropped()}});
  return {};
}

}  // namespace

ServeEnd ServeUntilEnd(Server* server, const sigset_t& signals, const ServeOptions& options,
                       rpc::Log* log) {
  while (true) {
    const int signal = sigtimedwait(&signals, nullptr, &kLook);
    if (signal == SIGHUP) {
      options.reload();
    } else if (signal > 0) {
      // A second signal ends the process as it would any other.
      sigset_t last = signals;
      sigdelset(&last, SIGHUP);
      pthread_sigmask(SIG_UNBLOCK, &last, nullptr);
      return Drain(server, signal, options.drain_limit(), log);
    } else {
      options.look();
    }
    const absl::Status health = server->sessions().backend().Health();
    if (!health.ok()) return EndLost(server, health, log);
  }
}

}  // namespace structkv
