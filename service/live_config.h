// The configuration of a running server, which its file may change.
#pragma once

#include <functional>
#include <string>
#include <variant>

#include "absl/time/time.h"
#include "service/config.h"
#include "service/rpc/log.h"
#include "service/server.h"

namespace structkv {

// Used by one thread.
class LiveConfig {
 public:
  // `parse` reads flags, environment and file anew, as ParseConfig did for `config`. `server` and
  // `log` outlive it.
  LiveConfig(Config config, std::function<std::variant<Config, EarlyExit>()> parse, Server* server,
             rpc::Log* log);

  // Takes what the file says now, all of it or nothing: nothing where it cannot be parsed, changes
  // an option that may not change, or names files that cannot be taken. Logs `reloaded`, or
  // `reload_refused` with the reason.
  void Reload();

  // To be called often: reloads where the file has changed, if --watch-config says so. Logs a
  // `warning` when the files of TLS cannot be taken any more, at two looks, or can again.
  void Look();

  absl::Duration drain_limit() const { return config_.drain_limit; }

 private:
  // Gives the names of the options that have changed, with commas.
  absl::StatusOr<std::string> Take();
  void LookAtTls();

  Config config_;
  const std::function<std::variant<Config, EarlyExit>()> parse_;
  Server* const server_;
  rpc::Log* const log_;
  std::string version_;         // of the file that was read
  int64_t next_tls_look_ = 0;   // of SteadyNanos()
  std::string seen_tls_error_;  // by the last look; empty: none
  std::string told_tls_error_;
};

}  // namespace structkv
