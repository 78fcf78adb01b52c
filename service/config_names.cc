#include "service/config_names.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "service/yaml_config.h"

namespace structkv {
namespace {

// What is read anew for each call, or for each look at a stream.
constexpr std::string_view kMayChange[] = {
    "client-names",       "drain-limit",         "hold-lease",    "log-sessions",
    "max-heads",          "max-hold-lease",      "max-layers",    "max-prompt-tokens",
    "max-sessions",       "max-window",          "proxy-names",   "retry-pushback",
    "session-limit",      "shard-group-limit",   "silence-limit", "stall-limit",
    "tenant-hold-budget", "tenant-max-sessions", "tenant-memory",
};

// Read by the CPU kernels, and by scripts that start servers.
constexpr absl::string_view kOthers[] = {"STRUCTKV_CPU_TARGET", "STRUCTKV_BIN",
                                         "STRUCTKV_GPU_BUNDLE", "STRUCTKV_NCCL"};
constexpr absl::string_view kOtherPrefixes[] = {"STRUCTKV_TEST_"};

// Variables that Kubernetes adds for a Service whose name begins with "structkv":
// STRUCTKV_SERVICE_HOST, STRUCTKV_SERVICE_PORT_GRPC, STRUCTKV_PORT=tcp://...,
// STRUCTKV_PORT_7411_TCP.
bool IsServiceLink(absl::string_view name, absl::string_view value) {
  if (absl::EndsWith(name, "_SERVICE_HOST") || absl::StrContains(name, "_SERVICE_PORT"))
    return true;
  const size_t port = name.rfind("_PORT_");
  if (port != absl::string_view::npos) {
    const absl::string_view number = name.substr(port + 6);
    return !number.empty() && std::isdigit(static_cast<unsigned char>(number[0])) != 0;
  }
  return absl::EndsWith(name, "_PORT") && absl::StrContains(value, "://");
}

bool IsOthers(absl::string_view name) {
  return std::find(std::begin(kOthers), std::end(kOthers), name) != std::end(kOthers) ||
         std::any_of(std::begin(kOtherPrefixes), std::end(kOtherPrefixes),
                     [&](absl::string_view prefix) { return absl::StartsWith(name, prefix); });
}

std::string Unknown(absl::string_view kind, const std::string& name,
                    const std::vector<std::string>& known) {
  const std::string closest = ClosestName(name, known);
  return absl::StrCat("unknown ", kind, " '", name, "'",
                      closest.empty() ? "" : absl::StrCat("; did you mean '", closest, "'?"));
}

}  // namespace

std::string EnvironmentName(const std::string& name) {
  std::string result = "STRUCTKV_";
  for (char c : name) result += c == '-' ? '_' : static_cast<char>(std::toupper(c));
  return result;
}

bool MayChange(std::string_view name) {
  return std::find(std::begin(kMayChange), std::end(kMayChange), name) != std::end(kMayChange);
}

std::string UnknownFlag(int argc, const char* const* argv, const std::string& otherwise,
                        const std::vector<std::string>& known) {
  std::vector<std::string> flags;
  for (const std::string& name : known) flags.push_back("--" + name);
  for (int i = 1; i < argc; ++i) {
    std::string flag = argv[i];
    flag = flag.substr(0, flag.find('='));
    if (flag.size() < 3 || !absl::StartsWith(flag, "--")) continue;
    if (std::find(flags.begin(), flags.end(), flag) != flags.end()) continue;
    return Unknown("flag", flag, flags);
  }
  return otherwise;
}

std::string UnknownInEnvironment(const std::vector<std::string>& known) {
  std::vector<std::string> names;
  for (const std::string& name : known) names.push_back(EnvironmentName(name));
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const absl::string_view text(*entry);
    const size_t equals = text.find('=');
    if (!absl::StartsWith(text, "STRUCTKV_") || equals == absl::string_view::npos) continue;
    const std::string name(text.substr(0, equals));
    if (std::find(names.begin(), names.end(), name) != names.end()) continue;
    if (IsOthers(name) || IsServiceLink(name, text.substr(equals + 1))) continue;
    return Unknown("variable", name, names);
  }
  return "";
}

}  // namespace structkv
