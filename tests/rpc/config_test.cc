// The server's options: flags, environment and file mean the same, in this order of precedence.
#include "service/config.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <ostream>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/config_names.h"
#include "service/file_version.h"

namespace structkv {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

class ConfigTest : public ::testing::Test {
 protected:
  void TearDown() override {
    for (const std::string& name : environment_) unsetenv(name.c_str());
    if (!path_.empty()) std::remove(path_.c_str());
  }

  void SetEnvironment(const std::string& name, const std::string& value) {
    setenv(name.c_str(), value.c_str(), /*overwrite=*/1);
    environment_.push_back(name);
  }

  // Writes a configuration file and gives its path.
  std::string File(const std::string& yaml) {
    const std::string path =
        ::testing::TempDir() + "/structkv_config_test." + std::to_string(getpid()) + ".yaml";
    path_ = path;
    std::ofstream(path) << yaml;
    return path;
  }

  static std::variant<Config, EarlyExit> Parse(const std::vector<std::string>& arguments) {
    std::vector<const char*> argv = {"structkv-server"};
    for (const std::string& argument : arguments) argv.push_back(argument.c_str());
    return ParseConfig(static_cast<int>(argv.size()), argv.data());
  }

  static Config Good(const std::vector<std::string>& arguments) {
    std::variant<Config, EarlyExit> parsed = Parse(arguments);
    if (const auto* exit = std::get_if<EarlyExit>(&parsed)) {
      ADD_FAILURE() << exit->text;
      return {};
    }
    return std::get<Config>(std::move(parsed));
  }

  // The text of a refusal.
  static std::string Refusal(const std::vector<std::string>& arguments) {
    const std::variant<Config, EarlyExit> parsed = Parse(arguments);
    const auto* exit = std::get_if<EarlyExit>(&parsed);
    if (exit == nullptr) return "accepted";
    EXPECT_EQ(exit->exit_code, 2);
    EXPECT_THAT(exit->text, ::testing::StartsWith("structkv-server: "));
    EXPECT_THAT(exit->text, ::testing::EndsWith("\n"));
    EXPECT_EQ(exit->text.find('\0'), std::string::npos);
    return exit->text;
  }

 private:
  std::vector<std::string> environment_;
  std::string path_;
};

TEST_F(ConfigTest, DefaultsAreThoseOfTheStructs) {
  const Config config = Good({});
  const Config defaults;
  EXPECT_EQ(config.server.listen, defaults.server.listen);
  EXPECT_EQ(config.server.backend, "auto");
  EXPECT_EQ(config.server.nccl.library, "");
  EXPECT_EQ(config.server.sessions.memory_budget_bytes,
            defaults.server.sessions.memory_budget_bytes);
  EXPECT_EQ(config.server.sessions.limits.max_prompt_tokens, 1 << 20);
  EXPECT_EQ(config.server.streams.max_message_bytes, 4 << 20);
  EXPECT_EQ(config.server.streams.stall, defaults.server.streams.stall);
  EXPECT_EQ(config.drain_limit, absl::Seconds(30));
  EXPECT_EQ(config.log_format, rpc::LogFormat::kText);
  EXPECT_TRUE(config.log_sessions);
  EXPECT_FALSE(config.check_only);
}

TEST_F(ConfigTest, FlagsSetEveryOption) {
  const Config config = Good({"--listen",
                              "127.0.0.1:0,unix:/tmp/a",
                              "--max-message=1MiB",
                              "--max-streams-per-connection=5",
                              "--max-streams-per-peer=7",
                              "--handshake-limit=1s",
                              "--keepalive-interval=2s",
                              "--keepalive-timeout=300ms",
                              "--backend=reference",
                              "--device-memory=2GiB",
                              "--nccl-library=/opt/libnccl.so.2",
                              "--nccl-memory=512MiB",
                              "--nccl-communicators=9",
                              "--threads=3",
                              "--memory-budget=1.5GB",
                              "--idle-buffers=0",
                              "--pivot-profile=/var/lib/structkv/pivots",
                              "--max-sessions=4",
                              "--max-prompt-tokens=5000",
                              "--max-layers=6",
                              "--max-heads=7",
                              "--max-window=8",
                              "--stall-limit=9s",
                              "--silence-limit=1m",
                              "--session-limit=1h",
                              "--shard-group-limit=7s",
                              "--retry-pushback=0",
                              "--drain-limit=1m30s",
                              "--log-format=json",
                              "--log-sessions=false",
                              "--check-config"});
  const ServerOptions& server = config.server;
  EXPECT_THAT(server.listen, ElementsAre("127.0.0.1:0", "unix:/tmp/a"));
  EXPECT_EQ(server.streams.max_message_bytes, 1 << 20);
  EXPECT_EQ(server.max_streams_per_connection, 5);
  EXPECT_EQ(server.max_streams_per_peer, 7);
  EXPECT_EQ(server.handshake_limit, absl::Seconds(1));
  EXPECT_EQ(server.keepalive_interval, absl::Seconds(2));
  EXPECT_EQ(server.keepalive_timeout, absl::Milliseconds(300));
  EXPECT_EQ(server.backend, "reference");
  EXPECT_EQ(server.device_memory_bytes, int64_t{2} << 30);
  EXPECT_EQ(server.nccl.library, "/opt/libnccl.so.2");
  EXPECT_EQ(server.nccl.memory_bytes, int64_t{512} << 20);
  EXPECT_EQ(server.nccl.worker.max_communicators, 9);
  EXPECT_EQ(server.sessions.threads, 3);
  EXPECT_EQ(server.sessions.memory_budget_bytes, 1'500'000'000);
  EXPECT_EQ(server.sessions.idle_buffer_bytes, 0);
  EXPECT_EQ(server.pivot_profile, "/var/lib/structkv/pivots");
  EXPECT_EQ(server.sessions.max_sessions, 4);
  EXPECT_EQ(server.sessions.limits.max_prompt_tokens, 5000);
  EXPECT_EQ(server.sessions.limits.max_layers, 6);
  EXPECT_EQ(server.sessions.limits.max_heads, 7);
  EXPECT_EQ(server.sessions.limits.max_window, 8);
  EXPECT_EQ(server.streams.stall, absl::Seconds(9));
  EXPECT_EQ(server.streams.silence, absl::Minutes(1));
  EXPECT_EQ(server.streams.session, absl::Hours(1));
  EXPECT_EQ(server.streams.shard_group, absl::Seconds(7));
  EXPECT_EQ(server.streams.retry_pushback, absl::ZeroDuration());
  EXPECT_EQ(config.drain_limit, absl::Seconds(90));
  EXPECT_EQ(config.log_format, rpc::LogFormat::kJson);
  EXPECT_FALSE(config.log_sessions);
  EXPECT_TRUE(config.check_only);
}

TEST_F(ConfigTest, CallsAreRecordedWhereTheyGoSomewhere) {
  EXPECT_EQ(Good({"--otlp-sample-ratio=0.5"}).server.trace_ratio, std::nullopt);
  Config config = Good({"--otlp-endpoint=http://collector:4318/v1/traces"});
  EXPECT_EQ(config.otlp_endpoint, "http://collector:4318/v1/traces");
  EXPECT_EQ(config.server.trace_ratio, 1.0);
  config = Good({"--config", File("otlp-endpoint: http://c\notlp-sample-ratio: 0.25\n")});
  EXPECT_EQ(config.server.trace_ratio, 0.25);
  EXPECT_EQ(config.otlp_authorities, "");
  config = Good({"--otlp-endpoint=https://collector/", "--otlp-authorities=/etc/ca.crt"});
  EXPECT_EQ(config.otlp_endpoint, "https://collector/");
  EXPECT_EQ(config.otlp_authorities, "/etc/ca.crt");
  EXPECT_THAT(Refusal({"--otlp-endpoint=ftp://collector/"}),
              HasSubstr("'ftp://collector/' is no http:// or https:// URL"));
  EXPECT_THAT(Refusal({"--otlp-sample-ratio=1.5"}), HasSubstr("otlp-sample-ratio"));
}

TEST_F(ConfigTest, FlagGoesBeforeEnvironmentBeforeFile) {
  const std::string file = File("threads: 1\nmemory-budget: 1GiB\nstall-limit: 1s\n");
  EXPECT_EQ(Good({"--config", file}).server.sessions.threads, 1);
  SetEnvironment("STRUCTKV_THREADS", "2");
  SetEnvironment("STRUCTKV_MEMORY_BUDGET", "2GiB");
  Config config = Good({"--config", file, "--threads", "3"});
  EXPECT_EQ(config.server.sessions.threads, 3);
  EXPECT_EQ(config.server.sessions.memory_budget_bytes, int64_t{2} << 30);
  EXPECT_EQ(config.server.streams.stall, absl::Seconds(1));
  SetEnvironment("STRUCTKV_CONFIG", file);
  config = Good({});
  EXPECT_EQ(config.server.sessions.threads, 2);
  EXPECT_EQ(config.server.streams.stall, absl::Seconds(1));
}

TEST_F(ConfigTest, TheFileOfTheEnvironmentMustBeThereToo) {
  SetEnvironment("STRUCTKV_CONFIG", "/no/such/file.yaml");
  EXPECT_THAT(Refusal({}), HasSubstr("/no/such/file.yaml"));
  EXPECT_EQ(Good({"--config", File("threads: 5\n")}).server.sessions.threads, 5);
  SetEnvironment("STRUCTKV_CONFIG", "");
  EXPECT_EQ(Good({}).server.sessions.threads, 0);
}

TEST_F(ConfigTest, AnEmptyVariableSetsNothing) {
  SetEnvironment("STRUCTKV_THREADS", "");
  EXPECT_EQ(Good({"--config", File("threads: 5\n")}).server.sessions.threads, 5);
}

TEST_F(ConfigTest, FilesHoldValuesAndLists) {
  const Config config = Good({"--config", File("listen: ['127.0.0.1:0', 'unix:/tmp/a']\n"
                                               "backend: \"cpu\"  # what computes\n"
                                               "log-sessions: no\n"
                                               "log-format: json\n"
                                               "max-message: 64KiB\n")});
  EXPECT_THAT(config.server.listen, ElementsAre("127.0.0.1:0", "unix:/tmp/a"));
  EXPECT_EQ(config.server.backend, "cpu");
  EXPECT_FALSE(config.log_sessions);
  EXPECT_EQ(config.log_format, rpc::LogFormat::kJson);
  EXPECT_EQ(config.server.streams.max_message_bytes, 64 << 10);
  EXPECT_EQ(Good({"--config", File("")}).server.backend, "auto");
}

TEST_F(ConfigTest, HelpAndVersionExitInPeace) {
  for (const char* flag : {"--help", "--version"}) {
    const std::variant<Config, EarlyExit> parsed = Parse({flag});
    ASSERT_TRUE(std::holds_alternative<EarlyExit>(parsed));
    EXPECT_EQ(std::get<EarlyExit>(parsed).exit_code, 0);
    EXPECT_THAT(std::get<EarlyExit>(parsed).text, HasSubstr("structkv-server"));
  }
  const std::string help = std::get<EarlyExit>(Parse({"--help"})).text;
  EXPECT_THAT(help, HasSubstr("--memory-budget SIZE"));
  EXPECT_THAT(help, HasSubstr("--log-format text|json"));
}

TEST_F(ConfigTest, RefusesWhatIsNoOption) {
  EXPECT_EQ(Refusal({"--thread-count=3"}), "structkv-server: unknown flag '--thread-count'\n");
  EXPECT_EQ(Refusal({"--memory-bugdet", "1GiB"}),
            "structkv-server: unknown flag '--memory-bugdet'; did you mean '--memory-budget'?\n");
  EXPECT_EQ(Refusal({"--threads", "1", "--chek-config"}),
            "structkv-server: unknown flag '--chek-config'; did you mean '--check-config'?\n");
  EXPECT_THAT(Refusal({"3"}), HasSubstr("3"));
  EXPECT_THAT(Refusal({"--threads", "1", "--threads", "2"}), HasSubstr("--threads"));
  EXPECT_THAT(Refusal({"--config", "/no/such/file.yaml"}), HasSubstr("/no/such/file.yaml"));
}

TEST_F(ConfigTest, RefusesVariablesThatAreNoOptions) {
  SetEnvironment("STRUCTKV_MEMORY_BUGDET", "1GiB");
  EXPECT_EQ(Refusal({}),
            "structkv-server: unknown variable 'STRUCTKV_MEMORY_BUGDET'; did you mean "
            "'STRUCTKV_MEMORY_BUDGET'?\n");
  EXPECT_EQ(std::get<EarlyExit>(Parse({})).exit_code, 2);
}

// A flag alone: a server that is to run is not asked whether it would.
TEST_F(ConfigTest, RefusesAVariableForCheckConfig) {
  SetEnvironment("STRUCTKV_CHECK_CONFIG", "true");
  EXPECT_THAT(Refusal({}), HasSubstr("unknown variable 'STRUCTKV_CHECK_CONFIG'"));
}

// Another file in its place while it is read is not taken for the one that was.
TEST_F(ConfigTest, TheVersionIsOfBeforeTheReading) {
  for (const bool by_flag : {true, false}) {
    const std::string path = File("");
    std::remove(path.c_str());
    ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
    std::thread writer([&path] {
      std::ofstream pipe(path);  // waits for the reader
      std::ofstream(path + ".next") << "threads: 4\n";
      std::rename((path + ".next").c_str(), path.c_str());
      pipe << "threads: 3\n";
    });
    if (!by_flag) SetEnvironment("STRUCTKV_CONFIG", path);
    const Config config = by_flag ? Good({"--config", path}) : Good({});
    writer.join();
    EXPECT_EQ(config.server.sessions.threads, 3);
    EXPECT_NE(config.file_version, "");
    EXPECT_NE(config.file_version, FileVersion(path));
  }
  const std::string path = File("threads: 3\n");
  EXPECT_EQ(Good({"--config", path}).file_version, FileVersion(path));
}

TEST_F(ConfigTest, LeavesVariablesOfOthersAlone) {
  // Kubernetes' for Services "structkv" and "structkv-gpu".
  SetEnvironment("STRUCTKV_SERVICE_HOST", "10.0.0.1");
  SetEnvironment("STRUCTKV_GPU_SERVICE_PORT_GRPC", "7411");
  SetEnvironment("STRUCTKV_PORT", "tcp://10.0.0.1:7411");
  SetEnvironment("STRUCTKV_GPU_PORT_7411_TCP_PROTO", "tcp");
  SetEnvironment("STRUCTKV_CPU_TARGET", "AVX2");
  Good({});
  // A name of the same kind with a value that is not of that kind.
  SetEnvironment("STRUCTKV_PORT", "7411");
  EXPECT_THAT(Refusal({}), HasSubstr("unknown variable 'STRUCTKV_PORT'"));
}

TEST_F(ConfigTest, ValuesAreTheSameHoweverTheyAreWritten) {
  const Config one = Good({"--memory-budget", "2GiB", "--stall-limit=60s", "--listen", "a:1,b:2"});
  const Config other = Good({"--config", File("memory-budget: 2048MiB\nstall-limit: 1m\n"
                                              "listen: ['a:1', 'b:2']\n")});
  EXPECT_EQ(one.values, other.values);
  EXPECT_EQ(one.values.at("listen"), "a:1,b:2");
  EXPECT_EQ(Good({}).values, Good({"--threads", "0", "--insecure=false"}).values);
  EXPECT_NE(Good({}).values, Good({"--insecure"}).values);
  EXPECT_NE(Good({"--otlp-sample-ratio", "0.1"}).values,
            Good({"--otlp-sample-ratio", "0.9"}).values);
  const std::string help = std::get<EarlyExit>(Parse({"--help"})).text;
  size_t marked = 0;
  for (size_t at = help.find("(reload)"); at != std::string::npos;
       at = help.find("(reload)", at + 1)) {
    ++marked;
  }
  size_t may_change = 0;
  for (const auto& [name, value] : one.values) may_change += MayChange(name) ? 1 : 0;
  EXPECT_GE(may_change, 10U);
  EXPECT_GE(marked, may_change);
}

TEST_F(ConfigTest, RefusesAFileByLineAndName) {
  const auto refusal = [&](const std::string& yaml) { return Refusal({"--config", File(yaml)}); };
  EXPECT_THAT(refusal("threads: 1\n\nmemory_budget: 1GiB\n"),
              HasSubstr("line 3: unknown key 'memory_budget'; did you mean 'memory-budget'?"));
  EXPECT_THAT(refusal("zebra: 1\n"), HasSubstr("line 1: unknown key 'zebra'\n"));
  EXPECT_THAT(refusal("check-config: true\n"), HasSubstr("unknown key 'check-config'"));
  EXPECT_THAT(refusal("threads: 1\nthreads: 2\n"),
              HasSubstr("line 2: key 'threads' is there twice"));
  EXPECT_THAT(refusal("threads: {a: 1}\n"), HasSubstr("threads must be a value or a list"));
  EXPECT_THAT(refusal("listen: [[a]]\n"), HasSubstr("listen must be a list of plain values"));
  EXPECT_THAT(refusal("listen: []\n"), HasSubstr("--listen: At least 1 required"));
  EXPECT_THAT(refusal("threads: [1, 2]\n"), HasSubstr("--threads"));
  EXPECT_THAT(refusal("- threads\n"), HasSubstr("the file must be a mapping"));
  EXPECT_THAT(refusal("threads: [1\n"), HasSubstr("not YAML"));
  EXPECT_THAT(refusal("[1]: 2\n"), HasSubstr("unknown key '?'"));
}

TEST_F(ConfigTest, RefusesAFilesValuesByLine) {
  const std::string file = File("log-format: json\nthreads: 2000\nmemory-budget: 1GiB\n");
  EXPECT_THAT(Refusal({"--config", file}), HasSubstr("line 2: --threads: Value 2000 not in range"));
  EXPECT_THAT(Refusal({"--config", File("\nmemory-budget: 1KiB\n")}),
              HasSubstr("line 2: --memory-budget"));
  EXPECT_THAT(Refusal({"--config", File("threads: some\n")}), HasSubstr("line 1: "));
  // What stands in no file has no line.
  EXPECT_THAT(Refusal({"--config", file, "--threads=3000"}), Not(HasSubstr("line")));
  EXPECT_THAT(Refusal({"--config", File("threads: 2\n"), "--max-layers", "0"}),
              Not(HasSubstr("line")));
}

// A wrong value of an option, and what the refusal says beside the option's name.
struct BadValue {
  std::string option;
  std::string value;
  std::string text;
};

void PrintTo(const BadValue& bad, std::ostream* out) { *out << bad.option << "=" << bad.value; }

class BadValueTest : public ConfigTest, public ::testing::WithParamInterface<BadValue> {};

TEST_P(BadValueTest, IsRefusedWhereverItComesFrom) {
  const auto& [option, value, text] = GetParam();
  const auto names_it =
      ::testing::AllOf(HasSubstr("--" + option), HasSubstr(value), HasSubstr(text));
  EXPECT_THAT(Refusal({"--" + option + "=" + value}), names_it);
  EXPECT_THAT(Refusal({"--config", File(option + ": '" + value + "'\n")}), names_it);
  std::string name = "STRUCTKV_";
  for (char c : option) name += c == '-' ? '_' : static_cast<char>(std::toupper(c));
  SetEnvironment(name, value);
  EXPECT_THAT(Refusal({}), names_it);
}

INSTANTIATE_TEST_SUITE_P(
    Sizes, BadValueTest,
    ::testing::Values(BadValue{"max-message", "65535", "allowed: 64KiB to 1GiB"},
                      BadValue{"max-message", "2GiB", "allowed: 64KiB to 1GiB"},
                      BadValue{"max-message", "large", "is no size"},
                      BadValue{"memory-budget", "1048575", "allowed: 1MiB to 64TiB"},
                      BadValue{"memory-budget", "65TiB", "allowed: 1MiB to 64TiB"},
                      BadValue{"memory-budget", "-1GiB", "is no size"},
                      BadValue{"memory-budget", "99999999TiB", "is no size"},
                      BadValue{"device-memory", "65TiB", "allowed: 0B to 64TiB"},
                      BadValue{"device-memory", "80%", "is no size"},
                      BadValue{"idle-buffers", "65TiB", "allowed: 0B to 64TiB"}));

INSTANTIATE_TEST_SUITE_P(
    Durations, BadValueTest,
    ::testing::Values(BadValue{"handshake-limit", "99ms", "allowed: 100ms to 24h"},
                      BadValue{"handshake-limit", "25h", "allowed: 100ms to 24h"},
                      BadValue{"keepalive-interval", "999ms", "allowed: 1s to 24h"},
                      BadValue{"keepalive-timeout", "0", "allowed: 100ms to 24h"},
                      BadValue{"stall-limit", "0", "allowed: 1ms to 24h"},
                      BadValue{"stall-limit", "30", "is no duration"},
                      BadValue{"silence-limit", "-1s", "is no duration"},
                      BadValue{"session-limit", "169h", "allowed: 1ms to 168h"},
                      BadValue{"shard-group-limit", "0", "allowed: 1ms to 24h"},
                      BadValue{"retry-pushback", "25h", "allowed: 0 to 24h"},
                      BadValue{"drain-limit", "inf", "is no duration"}));

INSTANTIATE_TEST_SUITE_P(
    Numbers, BadValueTest,
    ::testing::Values(
        BadValue{"max-streams-per-connection", "0", "1 to 1048576"},
        BadValue{"max-streams-per-peer", "-1", "0 to 2097152"},
        BadValue{"threads", "-1", "0 to 1024"}, BadValue{"threads", "1025", "0 to 1024"},
        BadValue{"threads", "many", "0 to 1024"}, BadValue{"max-sessions", "0", "1 to 1048576"},
        BadValue{"max-prompt-tokens", "16777217", "1 to 16777216"},
        BadValue{"max-layers", "1025", "1 to 1024"}, BadValue{"max-heads", "65537", "1 to 65536"},
        BadValue{"max-heads", "99999999999999999999", "1 to 65536"},
        BadValue{"max-window", "65", "1 to 64"}));

INSTANTIATE_TEST_SUITE_P(Names, BadValueTest,
                         ::testing::Values(BadValue{"backend", "abacus", "auto,"},
                                           BadValue{"log-format", "xml", "text,json"},
                                           BadValue{"log-sessions", "perhaps", ""}));

}  // namespace
}  // namespace structkv
