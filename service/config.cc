#include "service/config.h"

#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/backend_registry.h"
#include "service/build_info.h"
#include "service/config_names.h"
#include "service/file_version.h"
#include "service/trace/http_url.h"
#include "service/units.h"
#include "service/yaml_config.h"

namespace structkv {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kGiB = int64_t{1} << 30;
constexpr int64_t kTiB = int64_t{1} << 40;
constexpr char kOff[] = "off";
constexpr int64_t kDayMillis = int64_t{24} * 3600 * 1000;

std::string Text(const std::string& value) { return value; }
std::string Text(const std::vector<std::string>& value) { return absl::StrJoin(value, ","); }
// So many digits that no two numbers have the same.
std::string Text(double value) { return absl::StrFormat("%.17g", value); }
template <typename T>
std::enable_if_t<std::is_integral_v<T>, std::string> Text(T value) {
  return std::to_string(value);
}

using Parser = std::optional<int64_t> (*)(std::string_view);
using Formatter = std::string (*)(int64_t);

// Turns a value with a unit into a plain number within a range.
CLI::Validator Unit(Parser parse, Formatter format, const std::string& kind, int64_t min,
                    int64_t max) {
  const std::string range = format(min) + " to " + format(max);
  return {[=](std::string& text) -> std::string {
            const std::optional<int64_t> value = parse(text);
            if (!value.has_value()) return "'" + text + "' is no " + kind;
            if (*value < min || *value > max) return text + " is out of range; allowed: " + range;
            text = std::to_string(*value);
            return {};
          },
          range, ""};
}

// The schema: options are added to an app, each with its name for the environment.
class Schema {
 public:
  explicit Schema(CLI::App* app) : app_(app) {}

  CLI::Option* Named(CLI::Option* option, const std::string& name, const char* group) {
    names_.push_back(name);
    if (MayChange(name)) option->description(option->get_description() + " (reload)");
    return option->envname(EnvironmentName(name))->group(group);
  }

  template <typename T>
  CLI::Option* Add(const char* group, const std::string& name, T* value, const std::string& help) {
    CLI::Option* option = app_->add_option("--" + name, *value, help)->capture_default_str();
    values_[name] = [value] { return Text(*value); };
    return Named(option, name, group);
  }

  template <typename T>
  void Number(const char* group, const std::string& name, T* value, int64_t min, int64_t max,
              const std::string& help) {
    Add(group, name, value, help)
        ->check(CLI::Range(static_cast<T>(min), static_cast<T>(max)))
        ->option_text("N [" + std::to_string(*value) + "]");
  }

  void Bytes(const char* group, const std::string& name, int64_t* value, int64_t min, int64_t max,
             const std::string& help) {
    Add(group, name, value, help)
        ->transform(Unit(ParseBytes, FormatBytes, "size; write for instance 512MiB", min, max))
        ->default_str(FormatBytes(*value))
        ->option_text("SIZE [" + FormatBytes(*value) + "]");
  }

  // The duration is set by Finish.
  void Millis(const char* group, const std::string& name, absl::Duration* value, int64_t min,
              int64_t max, const std::string& help) {
    const auto millis = std::make_shared<int64_t>(absl::ToInt64Milliseconds(*value));
    Add(group, name, millis.get(), help)
        ->transform(Unit(ParseMillis, FormatMillis, "duration; write for instance 30s", min, max))
        ->default_str(FormatMillis(*millis))
        ->option_text("DURATION [" + FormatMillis(*millis) + "]");
    finish_.push_back([millis, value] { *value = absl::Milliseconds(*millis); });
  }

  // The format is set by Finish.
  void LogFormat(const char* group, const std::string& name, rpc::LogFormat* value,
                 const std::string& help) {
    auto text = std::make_shared<std::string>("text");
    Add(group, name, text.get(), help)
        ->check(CLI::IsMember(std::vector<std::string>{"text", "json"}))
        ->option_text("text|json [text]");
    finish_.push_back([text, value] {
      *value = *text == "json" ? rpc::LogFormat::kJson : rpc::LogFormat::kText;
    });
  }

  void Finish() const {
    for (const auto& step : finish_) step();
  }

  const std::vector<std::string>& names() const { return names_; }
  // What every option has after parsing, however it was written, or not written at all.
  std::map<std::string, std::string> Values() const {
    std::map<std::string, std::string> values;
    for (const auto& [name, text] : values_) values[name] = text();
    return values;
  }

 private:
  CLI::App* const app_;
  std::vector<std::string> names_;
  std::map<std::string, std::function<std::string()>> values_;
  std::vector<std::function<void()>> finish_;
};

void AddNetwork(Schema* schema, Config* config) {
  constexpr char kGroup[] = "Network";
  ServerOptions& server = config->server;
  schema
      ->Add(kGroup, "listen", &server.listen,
            "Address to listen on: host:port (port 0: any free one) or unix:/path; may be repeated")
      ->delimiter(',')
      ->option_text("ADDRESS ... [" + server.listen[0] + "]");
  schema
      ->Add(kGroup, "admin-listen", &config->admin.address,
            "Address of metrics, health and the status page (HTTP), host:port; off: they are not "
            "served")
      ->option_text("ADDRESS [" + config->admin.address + "]")
      ->check([](const std::string& address) {
        if (address == kOff) return std::string();
        return std::string(admin::CheckAddress(address).message());
      });
  schema->Bytes(kGroup, "max-message", &server.streams.max_message_bytes, rpc::kMinMessageBytes,
                kGiB, "Longest message in either direction");
  schema->Number(kGroup, "max-streams-per-connection", &server.max_streams_per_connection, 1,
                 1 << 20, "Streams at once on one connection");
  schema->Number(
      kGroup, "max-streams-per-peer", &server.max_streams_per_peer, 0, 1 << 21,
      "Streams at once on one connection whose client does not heed that, beyond which "
      "they are refused (RESOURCE_EXHAUSTED), and beyond four times which the connection "
      "is broken; of all unix sockets together 16 times as many; 0: twice "
      "max-streams-per-connection");
  schema->Number(kGroup, "max-connections", &server.max_connections, 0, 1 << 20,
                 "Connections at once to all addresses together, beyond which new ones are closed "
                 "unread; 0: as many as there are descriptors");
  schema->Millis(kGroup, "connection-age", &server.connection_age, 0, 7 * kDayMillis,
                 "A client is asked to connect anew after about this time, so that it finds other "
                 "replicas; its streams go on for up to session-limit; 0: never");
  schema->Millis(kGroup, "connection-idle", &server.connection_idle, 0, 7 * kDayMillis,
                 "A connection without streams is closed after this; 0: never");
  schema->Millis(kGroup, "handshake-limit", &server.handshake_limit, 100, kDayMillis,
                 "A connection without a finished handshake is closed after this");
  schema->Millis(kGroup, "keepalive-interval", &server.keepalive_interval, 1000, kDayMillis,
                 "A silent connection is asked for a sign of life this often");
  schema->Millis(kGroup, "keepalive-timeout", &server.keepalive_timeout, 100, kDayMillis,
                 "and is closed without an answer in this time");
}

void AddSecurity(Schema* schema, Config* config) {
  constexpr char kGroup[] = "Security";
  ServerOptions& server = config->server;
  const auto file = [&](const char* name, std::string* value, const char* help) {
    schema->Add(kGroup, name, value, help)->option_text("FILE");
  };
  file("tls-certificate", &server.tls.certificate,
       "The server's certificate and those up to an authority (PEM), for all addresses that are no "
       "unix sockets; read again when it changes");
  file("tls-key", &server.tls.key, "Its private key (PEM)");
  file("client-authorities", &server.tls.client_authorities,
       "Authorities (PEM) of one of which clients must show a certificate; none: they need not");
  schema
      ->Add(kGroup, "client-names", &server.identity.certificate_names,
            "Patterns of certificates' names that are tenants, with * for any run of characters; "
            "none: the first name is; may be repeated")
      ->delimiter(',')
      ->option_text("PATTERN ...");
  file("token-file", &server.identity.token_file,
       "Lines `TENANT TOKEN`: calls without a client's certificate must have one of the tokens, as "
       "`authorization: Bearer TOKEN`; read again when it changes");
  schema
      ->Add(kGroup, "proxy-names", &server.identity.proxy_names,
            "Patterns of the names of proxies' certificates: a proxy says whose call it passes on, "
            "as metadata structkv-tenant; none: a proxy is a client as any other; may be repeated")
      ->delimiter(',')
      ->option_text("PATTERN ...");
  schema
      ->Add(kGroup, "insecure", &server.insecure,
            "Allow addresses that other hosts reach without TLS")
      ->expected(0, 1)
      ->default_str("true")
      ->option_text("[BOOL]");
}

void AddCompute(Schema* schema, Config* config) {
  constexpr char kGroup[] = "Computing and memory";
  session::SessionManagerOptions& sessions = config->server.sessions;
  std::vector<std::string> backends = {"auto"};
  for (std::string_view name : BackendNames()) backends.emplace_back(name);
  schema
      ->Add(kGroup, "backend", &config->server.backend,
            "What computes: " + absl::StrJoin(backends, ", "))
      ->check(CLI::IsMember(backends))
      ->option_text("NAME [" + config->server.backend + "]");
  schema->Bytes(kGroup, "device-memory", &config->server.device_memory_bytes, 0, 64 * kTiB,
                "Memory taken of each GPU at the start, for all prompts together; 0: half of what "
                "is free");
  schema->Number(kGroup, "threads", &sessions.threads, 0, 1024, "Compute threads; 0: one per core");
  schema->Bytes(kGroup, "memory-budget", &sessions.memory_budget_bytes, kMiB, 64 * kTiB,
                "Memory for all prompts together; a prompt that does not fit is refused at open");
  schema->Bytes(kGroup, "idle-buffers", &sessions.idle_buffer_bytes, 0, 64 * kTiB,
                "Memory kept for reuse while no prompt needs it");
  schema->Bytes(kGroup, "hold-budget", &sessions.hold.budget_bytes, 0, 64 * kTiB,
                "Memory for held caches, beside that for prompts; 0: none is held");
}

void AddSharedMemory(Schema* schema, Config* config) {
  constexpr char kGroup[] = "Shared memory";
  rpc::RegionHostOptions& regions = config->server.regions;
  schema
      ->Add(kGroup, "region-socket", &regions.socket.path,
            "Path of the unix socket at which clients of this host register memory; none: there is "
            "neither shared memory nor CUDA IPC")
      ->option_text("PATH");
  schema->Bytes(kGroup, "shared-memory-limit", &regions.regions.max_bytes, kMiB, 64 * kTiB,
                "Memory of clients, of the host and of GPUs, that may be mapped at once");
  schema->Millis(kGroup, "region-lease", &regions.regions.lease, 100, kDayMillis,
                 "Life of a named region that is not renewed, where its client does not say");
  schema->Millis(kGroup, "region-lease-limit", &regions.regions.max_lease, 100, kDayMillis,
                 "Longest lease that a client may ask for");
}

void AddNccl(Schema* schema, Config* config) {
  constexpr char kGroup[] = "NCCL";
  rpc::NcclOptions& nccl = config->server.nccl;
  schema
      ->Add(kGroup, "nccl-library", &nccl.library,
            "Name (libnccl.so.2) or path of NCCL, by which tensors come from GPUs of other hosts; "
            "none: there is no NCCL transport. Needs the backend cuda")
      ->option_text("PATH");
  schema->Bytes(kGroup, "nccl-memory", &nccl.memory_bytes, 0, 64 * kTiB,
                "Of device-memory, set apart for tensors on their way; 0: half of it");
  schema->Number(kGroup, "nccl-communicators", &nccl.worker.max_communicators, 1, 1024,
                 "Clients' GPUs at once with each GPU, some 50 MB of its memory each, beside "
                 "device-memory; others wait for their turn");
}

void AddFiles(Schema* schema, Config* config) {
  schema
      ->Add(
          "Files", "pivot-profile", &config->server.pivot_profile,
          "File that each model's pivots are kept in, for the pivot mode PROFILED; none: they are "
          "forgotten at the end")
      ->option_text("FILE");
}

void AddLimits(Schema* schema, Config* config) {
  constexpr char kGroup[] = "Limits";
  session::SessionManagerOptions& sessions = config->server.sessions;
  rpc::StreamLimits& streams = config->server.streams;
  schema->Number(kGroup, "max-sessions", &sessions.max_sessions, 1, 1 << 20, "Prompts at once");
  schema->Number(kGroup, "tenant-max-sessions", &sessions.tenants.max_sessions, 0, 1 << 20,
                 "Prompts at once of one tenant; 0: max-sessions");
  schema->Bytes(kGroup, "tenant-memory", &sessions.tenants.memory_bytes, 0, 64 * kTiB,
                "Of memory-budget, for one tenant; 0: all");
  schema->Bytes(kGroup, "tenant-hold-budget", &sessions.tenants.hold_bytes, 0, 64 * kTiB,
                "Of hold-budget, for one tenant; 0: all");
  schema->Number(kGroup, "max-prompt-tokens", &sessions.limits.max_prompt_tokens, 1, 1 << 24,
                 "Longest prompt");
  schema->Number(kGroup, "max-layers", &sessions.limits.max_layers, 1, 1024,
                 "Layers of a model, at most");
  schema->Number(kGroup, "max-heads", &sessions.limits.max_heads, 1, 1 << 16,
                 "Query heads of a model, at most");
  schema->Number(kGroup, "max-window", &sessions.limits.max_window, 1, 64,
                 "Longest observation window in tokens");
  schema->Millis(kGroup, "stall-limit", &streams.stall, 1, kDayMillis,
                 "A caller that takes no results for this long is cut off (ABORTED)");
  schema->Millis(kGroup, "silence-limit", &streams.silence, 1, kDayMillis,
                 "A caller that sends nothing for this long is cut off (DEADLINE_EXCEEDED)");
  schema->Millis(kGroup, "session-limit", &streams.session, 1, 7 * kDayMillis,
                 "Longest a stream may last (DEADLINE_EXCEEDED)");
  schema->Millis(kGroup, "shard-group-limit", &streams.shard_group, 1, kDayMillis,
                 "How long a tensor-parallel group waits for its ranks (DEADLINE_EXCEEDED)");
  schema->Millis(kGroup, "hold-lease", &sessions.hold.default_lease, 1, 7 * kDayMillis,
                 "How long a held cache lives without a renewal, unless its prompt says otherwise");
  schema->Millis(kGroup, "max-hold-lease", &sessions.hold.max_lease, 1, 7 * kDayMillis,
                 "The longest that a prompt may say");
  schema->Millis(kGroup, "retry-pushback", &streams.retry_pushback, 0, kDayMillis,
                 "When a caller that found no room is told to try again");
  schema->Millis(kGroup, "drain-limit", &config->drain_limit, 0, 7 * kDayMillis,
                 "How long running streams may take after SIGTERM");
}

void AddLog(Schema* schema, Config* config) {
  constexpr char kGroup[] = "Log (standard error)";
  schema->LogFormat(kGroup, "log-format", &config->log_format, "text or json");
  schema->Add(kGroup, "log-sessions", &config->log_sessions, "One line at the end of a stream")
      ->option_text(config->log_sessions ? "BOOL [true]" : "BOOL [false]");
}

void AddTraces(Schema* schema, Config* config) {
  constexpr char kGroup[] = "Traces";
  schema
      ->Add(kGroup, "otlp-endpoint", &config->otlp_endpoint,
            "Collector that calls are sent to as spans (OTLP over HTTP), for instance "
            "http://127.0.0.1:4318/v1/traces, or https://; none: they are not recorded")
      ->option_text("URL")
      ->check([](const std::string& url) {
        return url.empty() ? std::string()
                           : std::string(trace::ParseHttpUrl(url).status().message());
      });
  schema
      ->Add(kGroup, "otlp-authorities", &config->otlp_authorities,
            "Authorities (PEM) of one of which an https:// collector must show a certificate; "
            "none: the system's")
      ->option_text("FILE");
  schema
      ->Add(kGroup, "otlp-sample-ratio", &config->otlp_sample_ratio,
            "Share of the calls without a traceparent that are recorded; with one its sampled flag "
            "decides")
      ->check(CLI::Range(0.0, 1.0))
      ->option_text("SHARE [1]");
}

void AddReload(Schema* schema, Config* config) {
  schema
      ->Add("Files", "watch-config", &config->watch,
            "Read the --config file again whenever it changes, as SIGHUP does")
      ->option_text("BOOL [false]");
}

// The options that the environment sets.
std::set<std::string> FromEnvironment(const std::vector<std::string>& names) {
  std::set<std::string> found;
  for (const std::string& name : names) {
    const char* value =
        std::getenv(EnvironmentName(name).c_str());  // NOLINT(concurrency-mt-unsafe)
    if (value != nullptr && *value != '\0') found.insert(name);
  }
  return found;
}

// Where the file has the value that `error` refuses; empty where no file has it, or a flag goes
// before the file's.
std::string WhereInFile(const std::string& error, const std::vector<std::string>& names,
                        const YamlConfig& file, int argc, const char* const* argv) {
  for (const std::string& name : names) {
    const std::string flag = "--" + name;
    const size_t at = error.find(flag);
    if (at == std::string::npos || error.find_first_of(": ", at) != at + flag.size()) continue;
    const bool given = std::any_of(argv + 1, argv + argc, [&](const std::string& argument) {
      return argument == flag || argument.rfind(flag + "=", 0) == 0;
    });
    return given ? std::string() : file.WhereIs(name);
  }
  return {};
}

}  // namespace

std::variant<Config, EarlyExit> ParseConfig(int argc, const char* const* argv) {
  Config config;
  CLI::App app(
      "StructKV server: compresses KV caches. Options come from flags, then from the "
      "environment (STRUCTKV_MEMORY_BUDGET for --memory-budget), then from the file. Defaults "
      "stand in brackets; a SIZE is for instance 512MiB, a DURATION 30s. The file's options with "
      "(reload) may change while the server runs: SIGHUP has it read again.",
      "structkv-server");
  app.set_version_flag("--version", BuildInfo());
  // CLI11 reads the file before it looks at the environment, so the variable is looked up here.
  const char* path = std::getenv("STRUCTKV_CONFIG");  // NOLINT(concurrency-mt-unsafe)
  const std::string file = path == nullptr ? "" : path;
  // Of the files as they were before they were read.
  std::map<std::string, std::string> versions;
  if (!file.empty()) versions.emplace(file, FileVersion(file));
  app.set_config("--config", file, "YAML file with options by name, for instance `threads: 8`",
                 /*config_required=*/!file.empty())
      ->envname("STRUCTKV_CONFIG")
      ->check([&versions](const std::string& name) {  // also after the reading
        versions.emplace(name, FileVersion(name));
        return std::string();
      })
      ->option_text("FILE");
  app.add_flag("--check-config", config.check_only, "Validate the options and exit");
  Schema schema(&app);
  AddNetwork(&schema, &config);
  AddSecurity(&schema, &config);
  AddCompute(&schema, &config);
  AddSharedMemory(&schema, &config);
  AddNccl(&schema, &config);
  AddFiles(&schema, &config);
  AddLimits(&schema, &config);
  AddLog(&schema, &config);
  AddTraces(&schema, &config);
  AddReload(&schema, &config);
  const auto yaml = std::make_shared<YamlConfig>(schema.names(), FromEnvironment(schema.names()));
  app.config_formatter(yaml);
  std::vector<std::string> others = schema.names();
  others.emplace_back("config");
  if (const std::string unknown = UnknownInEnvironment(others); !unknown.empty()) {
    return EarlyExit{2, "structkv-server: " + unknown + "\n"};
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ExtrasError& error) {
    others.insert(others.end(), {"check-config", "help", "version"});
    return EarlyExit{2, "structkv-server: " + UnknownFlag(argc, argv, error.what(), others) + "\n"};
  } catch (const CLI::ParseError& error) {
    std::ostringstream out;
    std::ostringstream errors;
    if (error.get_exit_code() == 0) {
      app.exit(error, out, errors);
      return EarlyExit{0, out.str()};
    }
    const std::string where = WhereInFile(error.what(), schema.names(), *yaml, argc, argv);
    return EarlyExit{2, "structkv-server: " + where + error.what() + "\n"};
  }
  schema.Finish();
  config.values = schema.Values();
  config.file = app["--config"]->empty() ? "" : app["--config"]->as<std::string>();
  config.file_version = versions[config.file];
  if (config.admin.address == kOff) config.admin.address.clear();
  if (!config.otlp_endpoint.empty()) config.server.trace_ratio = config.otlp_sample_ratio;
  return config;
}

}  // namespace structkv
