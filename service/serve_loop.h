// A started server until its end.
#pragma once

#include <csignal>
#include <functional>

#include "absl/time/time.h"
#include "service/rpc/log.h"
#include "service/server.h"

namespace structkv {

// What the process is to end with.
struct ServeEnd {
  int exit_code = 0;
  // Whether a thread may be stuck in the backend, so that nothing may be waited for any more.
  bool at_once = false;
};

struct ServeOptions {
  // Asked when a drain begins.
  std::function<absl::Duration()> drain_limit = [] { return absl::Seconds(30); };
  // Called on SIGHUP, if that is among the signals.
  std::function<void()> reload = [] {};
  // Called a few times a second, until the drain.
  std::function<void()> look = [] {};
};

// Waits for one of `signals`, which the caller has blocked in every thread, and drains the server
// within its limit (exit code 0), with a line `drain_progress` every second; or until the backend
// is lost, also while it drains, and fails everything as UNAVAILABLE (exit code 1), within 3
// seconds: the supervisor is to start a new process. While it drains, a second signal ends the
// process, SIGHUP alone does nothing. `log` is not null.
ServeEnd ServeUntilEnd(Server* server, const sigset_t& signals, const ServeOptions& options,
                       rpc::Log* log);

}  // namespace structkv
