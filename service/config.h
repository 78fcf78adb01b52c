// The server's options, from flags, the environment (STRUCTKV_*) and a YAML file, in this order of
// precedence. One schema for all three: `--memory-budget 8GiB`, STRUCTKV_MEMORY_BUDGET=8GiB and
// `memory-budget: 8GiB` mean the same.
#pragma once

#include <map>
#include <string>
#include <variant>

#include "absl/time/time.h"
#include "service/admin/http_server.h"
#include "service/rpc/log.h"
#include "service/server.h"

namespace structkv {

struct Config {
  ServerOptions server;  // all but the logs and the observer
  // Where metrics, health and the status page are served; none where it is empty.
  admin::HttpOptions admin = {.address = "127.0.0.1:7412"};
  // Where spans go (trace/otlp_exporter.h); nowhere where it is empty.
  std::string otlp_endpoint;
  // trace::OtlpOptions::authorities.
  std::string otlp_authorities;
  // ServerOptions::trace_ratio, where there is an endpoint.
  double otlp_sample_ratio = 1;
  // How long running streams may take after SIGTERM.
  absl::Duration drain_limit = absl::Seconds(30);
  rpc::LogFormat log_format = rpc::LogFormat::kText;
  bool log_sessions = true;
  // Read the file again when it changes.
  bool watch = false;
  // Validate the options and exit.
  bool check_only = false;

  // The file that was read; empty: none was.
  std::string file;
  // Of FileVersion(), when it was read.
  std::string file_version;
  // Every option's value, whichever way it came, in one form.
  std::map<std::string, std::string> values;
};

// What to do in place of serving: print `text`, to standard output where `exit_code` is 0, and
// exit.
struct EarlyExit {
  int exit_code = 0;
  std::string text;
};

// Every option is checked against its range here; a fault exits with a line that names the option,
// the value and what is allowed.
std::variant<Config, EarlyExit> ParseConfig(int argc, const char* const* argv);

}  // namespace structkv
