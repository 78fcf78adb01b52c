// A started server until its end.
#pragma once

#include <csignal>

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

// Waits for one of `signals`, which the caller has blocked in every thread, and drains the server
// within `drain_limit` (exit code 0); or until the backend is lost, and fails everything as
// UNAVAILABLE (exit code 1), within 3 seconds: the supervisor is to start a new process. `log` is
// not null.
ServeEnd ServeUntilEnd(Server* server, const sigset_t& signals, absl::Duration drain_limit,
                       rpc::Log* log);

}  // namespace structkv
