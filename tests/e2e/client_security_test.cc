// The client library and the command with a server that wants to know who calls: over TLS, with a
// certificate or a token, in messages and in shared memory.
#include <algorithm>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "grpcpp/security/credentials.h"
#include "gtest/gtest.h"
#include "structkv/arena.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/e2e/client_prompt.h"
#include "tests/testing/certificates.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;

constexpr char kToken[] = "0123456789abcdef";

class ClientSecurityTest : public ServiceTest {
 protected:
  ClientSecurityTest() : options_(TestOptions()) {
    options_.regions.socket.path = directory_.Path("regions");
    options_.sessions.hold.budget_bytes = 64 << 20;
  }

  std::string Write(const std::string& name, const std::string& text) {
    const std::string path = directory_.Path(name);
    std::ofstream(path) << text;
    return path;
  }
  void UseMutualTls() {
    const Authority::Pair own = authority_.Sign({"IP:127.0.0.1"});
    options_.tls = {.certificate = Write("server.crt", own.certificate),
                    .key = Write("server.key", own.key),
                    .client_authorities = Write("ca.crt", authority_.certificate())};
  }
  void UseTokens() {
    options_.identity.token_file = Write("tokens", std::string("prefill ") + kToken + "\n");
  }
  client::ClientOptions WithCertificate(const std::string& name) {
    const Authority::Pair own = authority_.Sign({"URI:" + name});
    client::ClientOptions options;
    options.credentials = grpc::SslCredentials({.pem_root_certs = authority_.certificate(),
                                                .pem_private_key = own.key,
                                                .pem_cert_chain = own.certificate});
    return options;
  }
  std::unique_ptr<client::Client> Connect(const client::ClientOptions& options) {
    auto client = client::Client::Connect(target(), options);
    EXPECT_TRUE(client.ok()) << client.status();
    return *std::move(client);
  }

  // The prompt in messages, or, with a region, in shared memory, which must be granted.
  static absl::StatusOr<client::Compressed> Compress(client::Client& client, const PromptData& data,
                                                     std::shared_ptr<client::Region> region = {}) {
    client::SessionOptions options;
    options.timeout = absl::Seconds(30);
    if (region != nullptr) {
      options.transport = client::TransportChoice::kSharedMemory;
      options.regions = {region};
      options.staging = std::make_shared<client::Arena>(region);
    }
    return client::CompressPrompt(
        client, data.open(),
        [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
          return TensorsOf(data, layer);
        },
        options);
  }
  static std::shared_ptr<client::Region> NewRegion() {
    auto region = client::Region::Create({.size_bytes = size_t{4} << 20});
    EXPECT_TRUE(region.ok()) << region.status();
    return *std::move(region);
  }

  const Authority authority_;
  const PromptData data_{SmallOpen(), 1};
  TemporaryDirectory directory_;
  ServerOptions options_;
};

TEST_F(ClientSecurityTest, ACertificateInMessagesAndSharedMemory) {
  UseMutualTls();
  StartAlone(options_);
  const auto client = Connect(WithCertificate("spiffe://cluster/prefill"));
  const auto capabilities = client->GetCapabilities();
  ASSERT_TRUE(capabilities.ok()) << capabilities.status();
  EXPECT_EQ(capabilities->tenant(), "peer:spiffe://cluster/prefill");
  const auto inline_result = Compress(*client, data_);
  ASSERT_TRUE(inline_result.ok()) << inline_result.status();
  // The region socket knows no certificates: the region is the caller's all the same.
  const auto shared = Compress(*client, data_, NewRegion());
  ASSERT_TRUE(shared.ok()) << shared.status();
  EXPECT_EQ(shared->summary.transport(), "shared_memory");
  ASSERT_EQ(shared->layers.size(), inline_result->layers.size());
  for (size_t i = 0; i < shared->layers.size(); ++i) {
    const auto equal = [](const client::Bytes& a, const client::Bytes& b) {
      return std::equal(a.span().begin(), a.span().end(), b.span().begin(), b.span().end());
    };
    EXPECT_TRUE(equal(shared->layers[i].keys, inline_result->layers[i].keys));
    EXPECT_TRUE(equal(shared->layers[i].values, inline_result->layers[i].values));
  }
}

// The addresses of a name show the name's certificate, those of a list their own.
TEST_F(ClientSecurityTest, ReplicasShowTheNamesCertificate) {
  UseMutualTls();
  const Authority::Pair own = authority_.Sign({"DNS:localhost"});
  Write("server.crt", own.certificate);
  Write("server.key", own.key);
  StartAlone(options_);
  const client::ClientOptions with = WithCertificate("spiffe://cluster/prefill");
  const std::string port = absl::StrCat(":", server().port());
  const auto by_name = client::Client::Connect("dns:///localhost" + port, with);
  ASSERT_TRUE(by_name.ok()) << by_name.status();
  const auto compressed = Compress(**by_name, data_);
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  v1::Open hold = SmallOpen();
  hold.set_output(v1::OUTPUT_HOLD);
  const auto held = Compress(**by_name, PromptData(hold, 1));
  ASSERT_TRUE(held.ok()) << held.status();
  // Whose address a replica's is, a decode worker knows before it has looked anything up.
  const std::string name = "dns:///localhost" + port;
  for (const std::string& target : {name, name + ",dns:///localhost:1"}) {
    const auto decode = client::Client::Connect(target, with);
    ASSERT_TRUE(decode.ok()) << decode.status();
    client::FetchOptions there;
    there.timeout = absl::Seconds(30);
    there.replica = "127.0.0.1" + port;
    const auto fetched = (*decode)->FetchCache(held->summary.held().handle(), there);
    EXPECT_TRUE(fetched.ok()) << target << ": " << fetched.status();
  }
  EXPECT_TRUE((*by_name)->ReleaseCache(held->summary.held().handle()).ok());
  const auto by_address = client::Client::Connect("127.0.0.1" + port + ",127.0.0.2" + port, with);
  ASSERT_TRUE(by_address.ok()) << by_address.status();
  EXPECT_TRUE(absl::IsUnavailable(Compress(**by_address, data_).status()));
}

TEST_F(ClientSecurityTest, ATokenGoesToEveryReplica) {
  UseTokens();
  options_.listen.push_back("unix:" + directory_.Path("socket"));
  StartAlone(options_);
  client::ClientOptions with;
  with.token = kToken;
  with.replicas.load_timeout = absl::Seconds(30);
  const std::string list = absl::StrCat(target(), ",", options_.listen[1]);
  const auto client = client::Client::Connect(list, with);
  ASSERT_TRUE(client.ok()) << client.status();
  const auto compressed = Compress(**client, data_);
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  EXPECT_TRUE(Eventually([&] {
    if (!(*client)->GetCapabilities().ok()) return false;
    const std::vector<client::ReplicaState> states = (*client)->Replicas();
    return std::all_of(states.begin(), states.end(), [](const client::ReplicaState& state) {
      return state.health == client::ReplicaState::Health::kReady;
    });
  }));
  // A token of the prompt's own is as good.
  const auto plain = client::Client::Connect(list);
  ASSERT_TRUE(plain.ok()) << plain.status();
  client::SessionOptions own;
  own.metadata = {{"authorization", std::string("Bearer ") + kToken}};
  const auto session = (*plain)->OpenPrompt(data_.open(), own);
  EXPECT_TRUE(session.ok()) << session.status();
  // One that none knows is told what it lacks, and does not try for ever.
  const auto stranger = client::Client::Connect(list);
  ASSERT_TRUE(stranger.ok()) << stranger.status();
  EXPECT_TRUE(absl::IsUnauthenticated(Compress(**stranger, data_).status()));
}

// A proxy is for names; the addresses of one are none.
TEST_F(ClientSecurityTest, AddressesOfANameNeedNoProxy) {
  StartAlone(options_);
  Process process({"/usr/bin/env", "http_proxy=http://127.0.0.1:1", "no_proxy=localhost",
                   STRUCTKV_COMMAND, "info", "--server",
                   absl::StrCat("dns:///localhost:", server().port())});
  const int code = process.Wait().value_or(-1);
  EXPECT_EQ(code, 0) << process.output() << process.error();
}

TEST_F(ClientSecurityTest, ATokenGoesWithEveryCall) {
  UseTokens();
  options_.listen.push_back("unix:" + directory_.Path("socket"));
  StartAlone(options_);
  for (const std::string& address : {target(), options_.listen[1]}) {
    SCOPED_TRACE(address);
    client::ClientOptions with;
    with.token = kToken;
    auto client = client::Client::Connect(address, with);
    ASSERT_TRUE(client.ok()) << client.status();
    const auto capabilities = (*client)->GetCapabilities();
    ASSERT_TRUE(capabilities.ok()) << capabilities.status();
    EXPECT_EQ(capabilities->tenant(), "token:prefill");
    const auto shared = Compress(**client, data_, NewRegion());
    ASSERT_TRUE(shared.ok()) << shared.status();
    EXPECT_EQ(shared->summary.transport(), "shared_memory");
  }
  EXPECT_EQ(Compress(*Connect({}), data_).status().code(), absl::StatusCode::kUnauthenticated);
  client::ClientOptions wrong;
  wrong.token = "0123456789abcdeg";
  EXPECT_EQ(Compress(*Connect(wrong), data_).status().code(), absl::StatusCode::kUnauthenticated);
}

TEST_F(ClientSecurityTest, TokensThatOthersCouldReadDoNotLeave) {
  client::ClientOptions options;
  options.token = kToken;
  EXPECT_EQ(client::Client::Connect("prefill.example:7411", options).status(),
            absl::InvalidArgumentError("ClientOptions.token would travel to prefill.example:7411 "
                                       "in plain text; ClientOptions.credentials are needed"));
  options.token = "a b";
  EXPECT_THAT(std::string(client::Client::Connect("127.0.0.1:1", options).status().message()),
              HasSubstr("ClientOptions.token has bytes that are no printable ASCII"));
}

TEST_F(ClientSecurityTest, TheCommandConnects) {
  UseMutualTls();
  UseTokens();
  options_.listen.push_back("unix:" + directory_.Path("socket"));
  StartAlone(options_);
  const Authority::Pair own = authority_.Sign({"DNS:command"});
  const std::string capture =
      std::string(STRUCTKV_TEST_DATA) + "/capture-tiny-llama-1000.safetensors";
  const auto run = [&](const std::string& server, const std::vector<std::string>& flags) {
    std::vector<std::string> command = {
        STRUCTKV_COMMAND, "compress", capture, "--out", directory_.Path("out.safetensors"),
        "--server",       server};
    command.insert(command.end(), flags.begin(), flags.end());
    Process process(command);
    const int code = process.Wait().value_or(-1);
    return std::pair(code, process.output() + process.error());
  };
  const auto tls = run(
      target(), {"--tls-authorities", Write("ca", authority_.certificate()), "--tls-certificate",
                 Write("crt", own.certificate), "--tls-key", Write("key", own.key)});
  EXPECT_EQ(tls.first, 0) << tls.second;
  const auto token =
      run(options_.listen[1], {"--token-file", Write("t", std::string(kToken) + "\n")});
  EXPECT_EQ(token.first, 0) << token.second;
  const auto neither = run(options_.listen[1], {});
  EXPECT_NE(neither.first, 0);
  EXPECT_THAT(neither.second, HasSubstr("authorization: Bearer TOKEN"));
  const auto missing = run(target(), {"--tls-authorities", "/nowhere"});
  EXPECT_NE(missing.first, 0);
  EXPECT_THAT(missing.second, HasSubstr("--tls-authorities /nowhere cannot be read"));
}

}  // namespace
}  // namespace structkv::testkit
