// What the status page shows, as JSON.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "service/admin/metrics.h"
#include "service/admin/recent.h"
#include "service/server.h"

namespace structkv::admin {

struct Status {
  Readings readings;
  std::string device;
  int threads = 0;
  std::vector<std::string> addresses;
  absl::Duration uptime;
  std::optional<DrainProgress> drain;  // none: it does not drain
  std::vector<rpc::PromptReport> running;
  std::vector<Recent::Prompt> prompts;
  std::vector<Recent::Error> errors;
};

// One object; status_page.html reads it.
std::string StatusJson(const Status& status);

}  // namespace structkv::admin
