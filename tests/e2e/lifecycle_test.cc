// The server's life as a process: what is checked before it, what may change during it, and how it
// ends.
#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "structkv/v1/compression.grpc.pb.h"
#include "tests/admin/http_get.h"
#include "tests/testing/call.h"
#include "tests/testing/certificates.h"
#include "tests/testing/health.h"
#include "tests/testing/held.h"
#include "tests/testing/process.h"
#include "tests/testing/prompt_data.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr char kToken[] = "0123456789abcdef";
constexpr char kOtherToken[] = "fedcba9876543210";

class LifecycleTest : public ::testing::Test {
 protected:
  // In one step, as Kubernetes does.
  std::string Write(const std::string& name, const std::string& text) {
    const std::string path = directory_.Path(name);
    std::ofstream(path + ".new") << text;
    std::filesystem::rename(path + ".new", path);
    return path;
  }
  std::string Address() const { return "unix:" + directory_.Path("socket"); }

  static std::pair<int, std::string> Run(const std::vector<std::string>& flags) {
    std::vector<std::string> command = {STRUCTKV_SERVER};
    command.insert(command.end(), flags.begin(), flags.end());
    Process server(command);
    const int code = server.Wait().value_or(-1);
    return {code, server.output() + server.error()};
  }

  // The value of `key=` in a line of the log.
  static std::string Field(const std::string& line, const std::string& key) {
    const size_t at = line.find(" " + key + "=");
    if (at == std::string::npos) return "";
    const size_t begin = at + key.size() + 2;
    return line.substr(begin, line.find(' ', begin) - begin);
  }

  TemporaryDirectory directory_;
};

grpc::Status Ask(const std::string& address, v1::GetCapabilitiesResponse* response,
                 const std::string& token = "") {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  if (!token.empty()) context.AddMetadata("authorization", "Bearer " + token);
  return v1::Compression::NewStub(NewChannel(address))->GetCapabilities(&context, {}, response);
}

uint32_t MaxSessions(const std::string& address) {
  v1::GetCapabilitiesResponse response;
  EXPECT_TRUE(Ask(address, &response).ok());
  return response.limits().max_sessions();
}

TEST_F(LifecycleTest, VersionSaysWhatItWasBuiltFrom) {
  const auto [code, text] = Run({"--version"});
  EXPECT_EQ(code, 0);
  EXPECT_THAT(text, StartsWith("structkv-server "));
  for (const char* field : {"\nrevision: ", "\nbackends: ", "\ncuda: ", "\nnccl: ",
                            "\nlibraries: gRPC 1.", "\ncompiler: "}) {
    EXPECT_THAT(text, HasSubstr(field));
  }
}

TEST_F(LifecycleTest, CheckConfigReadsWhatTheOptionsName) {
  const Authority authority;
  const Authority::Pair pair = authority.Sign({"IP:127.0.0.1"});
  const std::string certificate = Write("tls.crt", pair.certificate);
  const std::string key = Write("tls.key", pair.key);
  const std::string authorities = Write("ca.crt", authority.certificate());
  const std::string tokens = Write("tokens", std::string("a ") + kToken + "\n");
  const std::string file =
      Write("config.yaml",
            "listen: 0.0.0.0:7411\ntls-certificate: " + certificate + "\ntls-key: " + key +
                "\notlp-endpoint: https://127.0.0.1/\notlp-authorities: " + authorities + "\n");
  const std::vector<std::string> good = {
      "--check-config", "--config",     file,  "--client-authorities",
      authorities,      "--token-file", tokens};
  const auto [code, text] = Run(good);
  EXPECT_EQ(code, 0) << text;
  EXPECT_THAT(text, StartsWith("structkv-server: the configuration is valid\n"));
  EXPECT_THAT(text, HasSubstr("  file " + file + ": read\n"));
  EXPECT_THAT(text, HasSubstr("  tls-certificate " + certificate + ": ends at 20"));
  EXPECT_THAT(text, HasSubstr("  tls-key " + key + ": is the certificate's\n"));
  EXPECT_THAT(text, HasSubstr("  client-authorities " + authorities));
  EXPECT_THAT(text, HasSubstr("  token-file " + tokens + ": 1 tokens\n"));
  EXPECT_THAT(text, HasSubstr("  otlp-authorities " + authorities + ": certificates\n"));
  EXPECT_THAT(text, HasSubstr("  not tried: "));

  // A fault is one line, and the same for a server that starts.
  const auto fault = [&](const std::vector<std::string>& flags, const std::string& says) {
    std::vector<std::string> all = good;
    all.insert(all.end(), flags.begin(), flags.end());
    const auto [bad, line] = Run(all);
    EXPECT_EQ(bad, 1) << line;
    EXPECT_THAT(line, AllOf(StartsWith("structkv-server: "), HasSubstr(says)));
    EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1) << line;
    all.erase(all.begin());  // --check-config
    EXPECT_EQ(Run(all), std::pair(1, line));
  };
  fault({"--listen", "127.0.0.1"}, "listen is 127.0.0.1: there is no port; write host:port");
  fault({"--listen", "127.0.0.1:70000"}, "'70000' is no port from 0 to 65535");
  fault({"--listen", "::1:7411"}, "an IPv6 address stands in brackets");
  fault({"--otlp-authorities", key}, "otlp-authorities " + key + ": no certificates");
  fault({"--otlp-endpoint", "http://127.0.0.1/"},
        "otlp-authorities needs an otlp-endpoint of https");
  Write("tokens", "a short\n");
  fault({}, "token-file " + tokens + ", line 1: the token has 5 bytes");
  std::filesystem::remove(tokens);
  fault({}, "token-file " + tokens + " cannot be read");
  Write("tokens", std::string("a ") + kToken + "\n");
  Write("tls.key", authority.Sign({}).key);
  fault({}, "tls-key " + key + " is not the key of the first certificate in");
}

TEST_F(LifecycleTest, NamesThatAreNoOptions) {
  EXPECT_EQ(
      Run({"--treads", "3"}),
      std::pair(
          2, std::string("structkv-server: unknown flag '--treads'; did you mean '--threads'?\n")));
  EXPECT_EQ(Run({"--config", Write("config.yaml", "treads: 3\n")}),
            std::pair(2, std::string("structkv-server: line 1: unknown key 'treads'; did you mean "
                                     "'threads'?\n")));
  Process server({"/usr/bin/env", "STRUCTKV_TREADS=3", STRUCTKV_SERVER, "--check-config"});
  EXPECT_EQ(server.Wait(), 2);
  EXPECT_EQ(server.error(),
            "structkv-server: unknown variable 'STRUCTKV_TREADS'; did you mean "
            "'STRUCTKV_THREADS'?\n");
  // What Kubernetes tells every container of a Service "structkv".
  Process linked({"/usr/bin/env", "STRUCTKV_SERVICE_HOST=10.0.0.1", "STRUCTKV_SERVICE_PORT=7411",
                  "STRUCTKV_PORT=tcp://10.0.0.1:7411", "STRUCTKV_PORT_7411_TCP=tcp://10.0.0.1:7411",
                  "STRUCTKV_PORT_7411_TCP_ADDR=10.0.0.1", "STRUCTKV_SERVICE_PORT_GRPC=7411",
                  STRUCTKV_SERVER, "--check-config"});
  EXPECT_EQ(linked.Wait(), 0) << linked.error();
}

TEST_F(LifecycleTest, TheFileChangesWhatMayChange) {
  const std::string file = Write("config.yaml", "max-sessions: 7\nthreads: 1\n");
  Process server({STRUCTKV_SERVER, "--listen", Address(), "--config", file});
  ASSERT_TRUE(server.WaitForLine(" ready ")) << server.error();
  EXPECT_EQ(MaxSessions(Address()), 7U);

  Write("config.yaml", "threads: 1\nmax-sessions: 9\nmax-prompt-tokens: 50\nlog-sessions: false\n");
  server.Signal(SIGHUP);
  const std::optional<std::string> reloaded = server.WaitForLine(" reloaded ");
  ASSERT_TRUE(reloaded.has_value()) << server.error();
  EXPECT_THAT(*reloaded, HasSubstr("changed=log-sessions,max-prompt-tokens,max-sessions"));
  EXPECT_EQ(MaxSessions(Address()), 9U);
  const PromptData data(SmallOpen(60), 1);
  ExpectFailure(testkit::Run(NewChannel(Address()), AllMessages(data)),
                grpc::StatusCode::INVALID_ARGUMENT, {"60", "50"});

  // All or nothing: one that may not change, one out of range, one that does not agree.
  const auto refused = [&](const std::string& yaml, const std::string& says) {
    Write("config.yaml", yaml);
    const size_t before = server.error().size();
    server.Signal(SIGHUP);
    EXPECT_TRUE(Eventually([&] {
      server.WaitForLine("no such line", std::chrono::milliseconds(20));
      return server.error().find("reload_refused", before) != std::string::npos;
    })) << server.error();
    EXPECT_THAT(server.error().substr(before), HasSubstr(says));
    EXPECT_EQ(MaxSessions(Address()), 9U);
  };
  refused("threads: 2\nmax-sessions: 11\n",
          "threads cannot change while the server runs; it needs a new start");
  refused("threads: 1\nmax-sessions: 0\n", "line 2: --max-sessions");
  refused("threads: 1\nmax-sessions: 11\nhold-lease: 2m\nmax-hold-lease: 1m\n", "hold-lease is 2m");
  refused("threads: 1\nmax-sesions: 11\n", "did you mean ");
  EXPECT_THAT(server.error(), Not(HasSubstr(" session ")));  // log-sessions is off
}

TEST_F(LifecycleTest, AFileThatIsWatchedIsReadWhenItChanges) {
  const std::string file = Write("config.yaml", "max-sessions: 7\nwatch-config: true\n");
  Process server({STRUCTKV_SERVER, "--listen", Address(), "--config", file});
  ASSERT_TRUE(server.WaitForLine(" ready ")) << server.error();
  Write("config.yaml", "max-sessions: 8\nwatch-config: true\n");
  EXPECT_TRUE(server.WaitForLine(" reloaded ").has_value()) << server.error();
  EXPECT_EQ(MaxSessions(Address()), 8U);
}

TEST_F(LifecycleTest, TokensAndPatternsAreReadOnTheSignal) {
  const std::string tokens = Write("tokens", std::string("a ") + kToken + "\n");
  Process server({STRUCTKV_SERVER, "--listen", Address(), "--token-file", tokens});
  ASSERT_TRUE(server.WaitForLine(" ready ")) << server.error();
  v1::GetCapabilitiesResponse response;
  EXPECT_TRUE(Ask(Address(), &response, kToken).ok());
  Write("tokens", "a short\n");
  server.Signal(SIGHUP);
  const std::optional<std::string> refused = server.WaitForLine(" reload_refused ");
  ASSERT_TRUE(refused.has_value()) << server.error();
  EXPECT_THAT(*refused, HasSubstr("the token has 5 bytes"));
  EXPECT_TRUE(Ask(Address(), &response, kToken).ok());
  Write("tokens", std::string("b ") + kOtherToken + "\n");
  server.Signal(SIGHUP);
  ASSERT_TRUE(server.WaitForLine(" reloaded ").has_value()) << server.error();
  EXPECT_TRUE(Ask(Address(), &response, kOtherToken).ok());
  EXPECT_EQ(response.tenant(), "token:b");
}

// SIGTERM in mid-stream: the prompt that runs is finished, to the byte, and new ones go elsewhere.
TEST_F(LifecycleTest, SigtermDrainsWhatRuns) {
  Process server({STRUCTKV_SERVER, "--listen", Address(), "--drain-limit", "60s"});
  const std::optional<std::string> ready = server.WaitForLine(" ready ");
  ASSERT_TRUE(ready.has_value()) << server.error();
  const PromptData data(SmallOpen(300), 7);
  Call call(NewChannel(Address()));
  call.Send(OpenMessage(data.open()));
  ASSERT_TRUE(call.WaitForOpened().has_value());
  call.Send(LayerMessage(data, 0));
  ASSERT_TRUE(call.WaitForLayer(0));
  call.Send(PieceMessage(MakePiece(data, 1, v1::TENSOR_KEYS)));

  server.Signal(SIGTERM);
  const std::optional<std::string> draining = server.WaitForLine(" draining ");
  ASSERT_TRUE(draining.has_value()) << server.error();
  EXPECT_EQ(Field(*draining, "signal"), "SIGTERM");
  EXPECT_EQ(Field(*draining, "streams"), "1");
  const std::optional<std::string> progress = server.WaitForLine(" drain_progress ");
  ASSERT_TRUE(progress.has_value()) << server.error();
  EXPECT_EQ(Field(*progress, "streams"), "1");
  EXPECT_EQ(Field(*progress, "prompts"), "1");
  EXPECT_EQ(Field(*progress, "held_caches"), "0");
  EXPECT_LT(std::stoi(Field(*progress, "left_ms")), 60'000);
  EXPECT_EQ(Health(NewChannel(Address())), "NOT_SERVING");
  const auto page =
      nlohmann::json::parse(HttpGet(Field(*ready, "admin"), "/statusz.json").body, nullptr, false);
  ASSERT_TRUE(page.contains("drain")) << page.dump();
  EXPECT_EQ(page["drain"]["prompts"], 1);
  EXPECT_GT(page["drain"]["left_seconds"].get<double>(), 0);
  ExpectFailure(testkit::Run(NewChannel(Address()), AllMessages(data)),
                grpc::StatusCode::UNAVAILABLE, {"drain"});
  server.Signal(SIGHUP);  // means nothing any more

  for (uint32_t layer = 1; layer < data.layers(); ++layer) call.Send(LayerMessage(data, layer));
  call.Send(CommitMessage(data));
  call.HalfClose();
  ExpectSuccess(data, call.Finish());
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_THAT(server.error(), HasSubstr("streams_cut=none"));
}

// The caches that it holds are given away first.
TEST_F(LifecycleTest, SigtermWaitsForHeldCaches) {
  Process server(
      {STRUCTKV_SERVER, "--listen", Address(), "--drain-limit", "60s", "--hold-budget", "64MiB"});
  const std::optional<std::string> ready = server.WaitForLine(" ready ");
  ASSERT_TRUE(ready.has_value()) << server.error();
  const PromptData data(Held(SmallOpen(300)), 7);
  const Outcome outcome = testkit::Run(NewChannel(Address()), AllMessages(data));
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  const std::string handle = Assemble(outcome).summary->held().handle();
  // A stream is counted until a moment after its caller has seen the end.
  EXPECT_TRUE(Eventually([&] {
    return HttpGet(Field(*ready, "admin"), "/metrics").body.find("structkv_streams_active 0\n") !=
           std::string::npos;
  }));

  server.Signal(SIGTERM);
  const std::optional<std::string> draining = server.WaitForLine(" draining ");
  ASSERT_TRUE(draining.has_value()) << server.error();
  EXPECT_EQ(Field(*draining, "streams"), "0");
  EXPECT_EQ(Field(*draining, "held_caches"), "1");
  const std::optional<std::string> progress = server.WaitForLine(" drain_progress ");
  ASSERT_TRUE(progress.has_value()) << server.error();
  EXPECT_EQ(Field(*progress, "held_caches"), "1");
  EXPECT_THAT(HttpGet(Field(*ready, "admin"), "/metrics").body,
              AllOf(HasSubstr("structkv_held_caches 1\n"), HasSubstr("structkv_draining 1\n")));
  ExpectFailure(testkit::Run(NewChannel(Address()), AllMessages(data)),
                grpc::StatusCode::UNAVAILABLE, {"drain"});
  EXPECT_TRUE(Fetch(NewChannel(Address()), FetchRequest(handle)).status.ok());
  EXPECT_TRUE(Release(NewChannel(Address()), handle).ok());
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_THAT(server.error(), HasSubstr("streams_cut=none held_caches_lost=0"));
}

TEST_F(LifecycleTest, TheDrainLimitEndsHeldCaches) {
  Process server(
      {STRUCTKV_SERVER, "--listen", Address(), "--drain-limit", "300ms", "--hold-budget", "64MiB"});
  ASSERT_TRUE(server.WaitForLine(" ready ")) << server.error();
  ASSERT_TRUE(testkit::Run(NewChannel(Address()), AllMessages(PromptData(Held(SmallOpen()), 1)))
                  .status.ok());
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_THAT(server.error(), HasSubstr("streams_cut=none held_caches_lost=1"));
}

TEST_F(LifecycleTest, TheDrainLimitEndsWhatIsLeft) {
  const std::string file = Write("config.yaml", "drain-limit: 60s\n");
  Process server({STRUCTKV_SERVER, "--listen", Address(), "--config", file});
  ASSERT_TRUE(server.WaitForLine(" ready ")) << server.error();
  Write("config.yaml", "drain-limit: 200ms\n");  // the limit is that of the last reload
  server.Signal(SIGHUP);
  ASSERT_TRUE(server.WaitForLine(" reloaded ")) << server.error();
  const PromptData data(SmallOpen(), 1);
  Call call(NewChannel(Address()));
  call.Send(OpenMessage(data.open()));
  ASSERT_TRUE(call.WaitForOpened().has_value());
  server.Signal(SIGTERM);
  ExpectFailure(call.Finish(), grpc::StatusCode::UNAVAILABLE, {});
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_THAT(server.error(), HasSubstr("streams_cut=some"));
}

TEST_F(LifecycleTest, ASecondSignalEndsItAtOnce) {
  Process server({STRUCTKV_SERVER, "--listen", Address(), "--drain-limit", "1h"});
  ASSERT_TRUE(server.WaitForLine(" ready ")) << server.error();
  Call call(NewChannel(Address()));
  call.Send(OpenMessage(PromptData(SmallOpen(), 1).open()));
  ASSERT_TRUE(call.WaitForOpened().has_value());
  server.Signal(SIGTERM);
  ASSERT_TRUE(server.WaitForLine(" draining ")) << server.error();
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 128 + SIGTERM);
}

}  // namespace
}  // namespace structkv::testkit
