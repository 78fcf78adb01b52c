// Who may call: TLS, clients' certificates, tokens, and that what one tenant has is not another's.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/live_config.h"
#include "service/rpc/tls.h"
#include "structkv/v1/compression.grpc.pb.h"
#include "structkv/v1/held_cache.grpc.pb.h"
#include "structkv/v1/nccl.grpc.pb.h"
#include "structkv/v1/region.grpc.pb.h"
#include "tests/testing/certificates.h"
#include "tests/testing/health.h"
#include "tests/testing/held.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"
#include "tests/testing/shards.h"
#include "tests/testing/shared_region.h"

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;

constexpr char kPrefillToken[] = "0123456789abcdef";
constexpr char kDecodeToken[] = "fedcba9876543210";

Metadata Bearer(const std::string& token) { return {{"authorization", "Bearer " + token}}; }

// GetCapabilities of a caller.
grpc::Status Ask(const std::shared_ptr<grpc::Channel>& channel, std::string* tenant = nullptr,
                 const Metadata& metadata = {}) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  for (const auto& [key, value] : metadata) context.AddMetadata(key, value);
  v1::GetCapabilitiesResponse response;
  grpc::Status status = v1::Compression::NewStub(channel)->GetCapabilities(&context, {}, &response);
  if (tenant != nullptr) *tenant = response.tenant();
  return status;
}

class SecurityTest : public ServiceTest {
 protected:
  // Takes the place of the file in one step, as Kubernetes does.
  std::string Write(const std::string& name, const std::string& text) {
    const std::string path = directory_.Path(name);
    std::ofstream(path + ".new") << text;
    std::filesystem::rename(path + ".new", path);
    return path;
  }
  std::string Read(const std::string& name) {
    std::ifstream file(directory_.Path(name));
    return {std::istreambuf_iterator<char>(file), {}};
  }
  ServerOptions Tls(const Authority::Pair& pair) {
    ServerOptions options = TestOptions();
    options.tls.certificate = Write("certificate", pair.certificate);
    options.tls.key = Write("key", pair.key);
    options.tls.look_seconds = 1;
    options.sessions.hold.budget_bytes = 64 << 20;
    return options;
  }
  ServerOptions MutualTls() {
    ServerOptions options = Tls(authority_.Sign({"DNS:localhost", "IP:127.0.0.1"}));
    options.tls.client_authorities = Write("authorities", authority_.certificate());
    return options;
  }
  ServerOptions Tokens() {
    ServerOptions options = TestOptions();
    options.sessions.hold.budget_bytes = 64 << 20;
    options.identity.token_file = Write(
        "tokens", std::string("prefill ") + kPrefillToken + "\ndecode " + kDecodeToken + "\n");
    return options;
  }
  std::shared_ptr<grpc::Channel> As(const std::vector<std::string>& names) {
    return NewTlsChannel(target(), authority_.certificate(), authority_.Sign(names));
  }
  // Holds a cache for the caller, and returns its handle.
  std::string Hold(const std::shared_ptr<grpc::Channel>& channel, const Metadata& metadata = {}) {
    const PromptData data(Held(SmallOpen()), 3);
    const Outcome outcome =
        testkit::Run(channel, AllMessages(data), CallOptions{.metadata = metadata});
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    return outcome.responses.empty() ? "" : outcome.responses.back().summary().held().handle();
  }

  const Authority authority_;
  TemporaryDirectory directory_;
};

TEST_F(SecurityTest, TlsAlone) {
  StartAlone(Tls(authority_.Sign({"IP:127.0.0.1"})));
  const auto trusted = NewTlsChannel(target(), authority_.certificate());
  const PromptData data(SmallOpen(), 1);
  ExpectSuccess(data, testkit::Run(trusted, AllMessages(data)));
  std::string tenant;
  EXPECT_TRUE(Ask(trusted, &tenant, {{"structkv-tenant", "a"}}).ok());
  EXPECT_EQ(tenant, "name:a");
  EXPECT_EQ(Ask(NewChannel(target())).error_code(), grpc::StatusCode::UNAVAILABLE);  // plain text
  EXPECT_EQ(Ask(NewTlsChannel(target(), Authority().certificate())).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  ExpectNothingHeld();
}

TEST_F(SecurityTest, ClientsShowCertificates) {
  StartAlone(MutualTls());
  const auto prefill = As({"URI:spiffe://cluster/prefill", "DNS:prefill"});
  std::string tenant;
  EXPECT_TRUE(Ask(prefill, &tenant, {{"structkv-tenant", "somebody"}}).ok());
  EXPECT_EQ(tenant, "peer:spiffe://cluster/prefill");
  EXPECT_TRUE(Ask(As({}), &tenant).ok());
  EXPECT_EQ(tenant, "peer:common");
  EXPECT_EQ(Ask(NewTlsChannel(target(), authority_.certificate())).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Ask(NewTlsChannel(target(), authority_.certificate(), Authority().Sign({"DNS:a"})))
                .error_code(),
            grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(
      Ask(NewTlsChannel(target(), authority_.certificate(), authority_.Sign({}, -30))).error_code(),
      grpc::StatusCode::UNAVAILABLE);

  const std::string handle = Hold(prefill);
  EXPECT_TRUE(Fetch(prefill, FetchRequest(handle)).status.ok());
  const auto other = As({"URI:spiffe://cluster/other"});
  const Metadata claim = {{"structkv-tenant", "peer:spiffe://cluster/prefill"}};
  EXPECT_EQ(Fetch(other, FetchRequest(handle), claim).status.error_code(),
            grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Release(other, handle, claim).error_code(), grpc::StatusCode::NOT_FOUND);
  // The same name in another connection, with another key, is the same tenant.
  EXPECT_TRUE(Release(As({"URI:spiffe://cluster/prefill"}), handle).ok());
  ExpectNothingHeld();
}

TEST_F(SecurityTest, NamesThatAreTenants) {
  ServerOptions options = MutualTls();
  options.identity.certificate_names = {"spiffe://cluster/ns/*/prefill", "*.decode"};
  StartAlone(options);
  std::string tenant;
  EXPECT_TRUE(Ask(As({"DNS:a", "URI:spiffe://cluster/ns/llm/prefill"}), &tenant).ok());
  EXPECT_EQ(tenant, "peer:spiffe://cluster/ns/llm/prefill");
  EXPECT_TRUE(Ask(As({"DNS:1.decode"}), &tenant).ok());
  EXPECT_EQ(tenant, "peer:1.decode");
  const grpc::Status refused = Ask(As({"DNS:a", "DNS:b"}));
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(refused.error_message(),
            "no name of the client's certificate (a, b) is allowed here (--client-names)");
  EXPECT_EQ(server().calls_refused().permission_denied, 1);
  const PromptData data(SmallOpen(), 1);
  ExpectFailure(testkit::Run(As({"DNS:a"}), AllMessages(data)), grpc::StatusCode::PERMISSION_DENIED,
                {"(a)"});
  ExpectNothingHeld();
}

TEST_F(SecurityTest, CertificatesAreReadAgain) {
  StartAlone(Tls(authority_.Sign({"IP:127.0.0.1"})));
  EXPECT_TRUE(Ask(NewTlsChannel(target(), authority_.certificate())).ok());
  const Authority next;
  const Authority::Pair pair = next.Sign({"IP:127.0.0.1"});
  Write("key", pair.key);
  Write("certificate", pair.certificate);
  EXPECT_TRUE(Eventually([&] { return Ask(NewTlsChannel(target(), next.certificate())).ok(); }));
}

// Those of clients too: a rotation needs no restart.
TEST_F(SecurityTest, AuthoritiesAreReadAgain) {
  StartAlone(MutualTls());
  const Authority next;
  const auto by_next = [&] {
    return NewTlsChannel(target(), authority_.certificate(), next.Sign({"DNS:prefill"}));
  };
  EXPECT_EQ(Ask(by_next()).error_code(), grpc::StatusCode::UNAVAILABLE);
  // Both, as in the midst of a rotation.
  Write("authorities", authority_.certificate() + next.certificate());
  EXPECT_TRUE(Eventually([&] { return Ask(by_next()).ok(); }));
  EXPECT_TRUE(Ask(As({"DNS:prefill"})).ok());
  // The old one goes.
  Write("authorities", next.certificate());
  EXPECT_TRUE(Eventually(
      [&] { return Ask(As({"DNS:prefill"})).error_code() == grpc::StatusCode::UNAVAILABLE; }));
  std::string tenant;
  EXPECT_TRUE(Ask(by_next(), &tenant).ok());
  EXPECT_EQ(tenant, "peer:prefill");
}

// Full names of the public API's calls, as its descriptors have them.
std::vector<std::string> CallsOfTheApi() {
  std::vector<std::string> names;
  for (const google::protobuf::FileDescriptor* file :
       {v1::GetCapabilitiesRequest::descriptor()->file(),
        v1::FetchCacheRequest::descriptor()->file(), v1::AttachRequest::descriptor()->file(),
        v1::RegisterRegionRequest::descriptor()->file()}) {
    for (int i = 0; i < file->service_count(); ++i) {
      for (int j = 0; j < file->service(i)->method_count(); ++j) {
        names.push_back(file->service(i)->method(j)->name());
      }
    }
  }
  return names;
}

// The text, without the first digits of the handle that a region's has.
std::string WithoutHandle(const grpc::Status& status) {
  const std::string prefix = "the region ";
  std::string text = status.error_message();
  if (text.rfind(prefix, 0) == 0) text.erase(prefix.size(), 8);
  return text;
}

class EveryCallTest : public SecurityTest {
 protected:
  // The status of one call of each kind, by the call's name. `handle` is what calls about handles
  // ask for.
  std::map<std::string, std::function<grpc::Status(const Metadata&)>> Calls(
      const std::string& handle) {
    return {
        {"Compress",
         [this](const Metadata& metadata) {
           const PromptData data(SmallOpen(), 1);
           return Run(AllMessages(data), CallOptions{.metadata = metadata}).status;
         }},
        {"GetCapabilities",
         [this](const Metadata& metadata) { return Ask(channel(), nullptr, metadata); }},
        {"GetLoad",
         [this](const Metadata& metadata) {
           grpc::ClientContext context;
           Prepare(metadata, &context);
           v1::GetLoadResponse response;
           return v1::Compression::NewStub(channel())->GetLoad(&context, {}, &response);
         }},
        {"FetchCache",
         [=, this](const Metadata& metadata) {
           return Fetch(channel(), FetchRequest(handle), metadata).status;
         }},
        {"RenewCache",
         [=, this](const Metadata& metadata) { return Renew(channel(), handle, metadata); }},
        {"ReleaseCache",
         [=, this](const Metadata& metadata) { return Release(channel(), handle, metadata); }},
        {"RegisterRegion",
         [this](const Metadata& metadata) {
           return Region(&v1::Regions::Stub::RegisterRegion, v1::RegisterRegionRequest(), metadata);
         }},
        {"GetRegion",
         [=, this](const Metadata& metadata) {
           return OfRegion(&v1::Regions::Stub::GetRegion, handle, metadata);
         }},
        {"RenewRegion",
         [=, this](const Metadata& metadata) {
           return OfRegion(&v1::Regions::Stub::RenewRegion, handle, metadata);
         }},
        {"UnregisterRegion",
         [=, this](const Metadata& metadata) {
           return OfRegion(&v1::Regions::Stub::UnregisterRegion, handle, metadata);
         }},
        {"Attach",
         [this](const Metadata& metadata) {
           grpc::ClientContext context;
           Prepare(metadata, &context);
           const auto stream = v1::NcclTransport::NewStub(channel())->Attach(&context);
           stream->WritesDone();
           v1::AttachResponse response;
           while (stream->Read(&response)) {
           }
           return stream->Finish();
         }},
    };
  }

  ServerOptions AllServices() {
    ServerOptions options = Tokens();
    options.regions.socket.path = directory_.Path("regions");
    options.backend = "cpu";
    options.nccl.library = "libnccl.so.2";  // for its service; there is no GPU
    return options;
  }

 private:
  template <typename Request, typename Response>
  grpc::Status Region(grpc::Status (v1::Regions::Stub::*method)(grpc::ClientContext*,
                                                                const Request&, Response*),
                      const Request& request, const Metadata& metadata) {
    grpc::ClientContext context;
    Prepare(metadata, &context);
    Response response;
    return (v1::Regions::NewStub(channel()).get()->*method)(&context, request, &response);
  }
  template <typename Request, typename Response>
  grpc::Status OfRegion(grpc::Status (v1::Regions::Stub::*method)(grpc::ClientContext*,
                                                                  const Request&, Response*),
                        const std::string& handle, const Metadata& metadata) {
    Request request;
    request.set_handle(handle);
    return Region(method, request, metadata);
  }
};

// No call goes without a token but those of health and reflection, which say nothing of prompts.
TEST_F(EveryCallTest, NeedsAToken) {
  StartAlone(AllServices());
  const auto calls = Calls(std::string(16, 'h'));
  for (const std::string& name : CallsOfTheApi()) {
    EXPECT_TRUE(calls.contains(name)) << name << " is a call that this test does not make";
  }
  for (const auto& [name, call] : calls) {
    for (const Metadata& bad :
         {Metadata{}, Bearer(""), Bearer("0123456789abcdeg"), Bearer("0123456789abcdef "),
          Metadata{{"authorization", kPrefillToken}},
          Metadata{{"authorization", std::string("Basic ") + kPrefillToken}}}) {
      EXPECT_EQ(call(bad).error_code(), grpc::StatusCode::UNAUTHENTICATED) << name;
    }
    EXPECT_NE(call(Bearer(kPrefillToken)).error_code(), grpc::StatusCode::UNAUTHENTICATED) << name;
  }
  // Each is counted, whatever it asks for.
  EXPECT_EQ(server().calls_refused().unauthenticated, static_cast<int64_t>(6 * calls.size()));
  EXPECT_EQ(server().calls_refused().permission_denied, 0);
  EXPECT_EQ(Ask(channel()).error_message(),
            "the call has no metadata `authorization: Bearer TOKEN`, which this server asks for");
  EXPECT_EQ(Health(channel()), "SERVING");
  EXPECT_THAT(ReflectedServices(channel()), HasSubstr("structkv.v1.NcclTransport"));
  ExpectNothingHeld();
}

// What a handle is of, nobody but its tenant learns: every call about one answers as to a handle
// that never was.
TEST_F(EveryCallTest, FindsNoHandleOfAnotherTenant) {
  StartAlone(AllServices());
  const std::string name = "structkv.security-" + std::to_string(getpid());
  const auto file = SharedFile::Named(name, 64 << 10);
  v1::RegisterRegionRequest region;
  region.set_name(name);
  region.set_size_bytes(64 << 10);
  v1::RegisterRegionResponse registered;
  {
    grpc::ClientContext context;
    Prepare(Bearer(kPrefillToken), &context);
    const grpc::Status status =
        v1::Regions::NewStub(channel())->RegisterRegion(&context, region, &registered);
    ASSERT_TRUE(status.ok()) << status.error_message();
  }
  const std::string cache = Hold(channel(), Bearer(kPrefillToken));
  const std::string never(16, 'h');
  for (const auto& [handle, names] :
       {std::pair(cache, std::vector<std::string>{"FetchCache", "RenewCache", "ReleaseCache"}),
        std::pair(registered.handle(),
                  std::vector<std::string>{"GetRegion", "RenewRegion", "UnregisterRegion"})}) {
    const auto calls = Calls(handle);
    const auto unknown = Calls(never);
    for (const std::string& call : names) {
      const grpc::Status theirs = calls.at(call)(Bearer(kDecodeToken));
      EXPECT_EQ(theirs.error_code(), grpc::StatusCode::NOT_FOUND) << call;
      EXPECT_EQ(WithoutHandle(theirs), WithoutHandle(unknown.at(call)(Bearer(kDecodeToken))))
          << call;
    }
    for (const std::string& call : names) {
      EXPECT_TRUE(calls.at(call)(Bearer(kPrefillToken)).ok()) << call;
    }
  }
  ExpectNothingHeld();
}

// A proxy that the server knows says whose calls it passes on; whoever else says so is not
// believed.
TEST_F(SecurityTest, AProxySpeaksForOthers) {
  ServerOptions options = MutualTls();
  options.identity.proxy_names = {"proxy.*"};
  StartAlone(options);
  const auto proxy = As({"DNS:proxy.structkv"});
  const auto other = As({"DNS:prefill"});
  std::string tenant;
  EXPECT_TRUE(Ask(proxy, &tenant, {{"structkv-tenant", "prefill"}}).ok());
  EXPECT_EQ(tenant, "peer:prefill");
  EXPECT_TRUE(Ask(other, &tenant, {{"structkv-tenant", "decode"}}).ok());
  EXPECT_EQ(tenant, "peer:prefill");
  const Metadata twice = {{"structkv-tenant", "prefill"}, {"structkv-tenant", "decode"}};
  for (const Metadata& nobody : {Metadata{}, Metadata{{"structkv-tenant", ""}}, twice}) {
    EXPECT_EQ(Ask(proxy, nullptr, nobody).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  }
  // What is held by way of the proxy is the tenant's own, whichever way it comes next.
  const std::string handle = Hold(proxy, {{"structkv-tenant", "prefill"}});
  EXPECT_EQ(Release(proxy, handle, {{"structkv-tenant", "decode"}}).error_code(),
            grpc::StatusCode::NOT_FOUND);
  EXPECT_TRUE(Release(other, handle).ok());
  ExpectNothingHeld();
}

TEST_F(SecurityTest, PatternsHoldBehindAProxyToo) {
  ServerOptions options = MutualTls();
  options.identity.proxy_names = {"proxy.*"};
  options.identity.certificate_names = {"prefill*"};
  StartAlone(options);
  const auto proxy = As({"DNS:proxy.structkv"});
  std::string tenant;
  EXPECT_TRUE(Ask(proxy, &tenant, {{"structkv-tenant", "prefill-3"}}).ok());
  EXPECT_EQ(tenant, "peer:prefill-3");
  const grpc::Status refused = Ask(proxy, nullptr, {{"structkv-tenant", "decode"}});
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_THAT(refused.error_message(), HasSubstr("the proxy's caller, decode, is not allowed"));
  EXPECT_EQ(server().calls_refused().permission_denied, 1);
}

// A token says whose call it is, so that the proxy's word is not asked for.
TEST_F(SecurityTest, PatternsAreNotOfTokensBehindAProxy) {
  ServerOptions options = MutualTls();
  options.identity = Tokens().identity;
  options.identity.proxy_names = {"proxy.*"};
  options.identity.certificate_names = {"nobody"};
  StartAlone(options);
  Metadata metadata = Bearer(kDecodeToken);
  metadata.emplace_back("structkv-tenant", "someone");
  std::string tenant;
  EXPECT_TRUE(Ask(As({"DNS:proxy.structkv"}), &tenant, metadata).ok());
  EXPECT_EQ(tenant, "token:decode");
}

// Once, and once more for each other reason, and when all is well again.
TEST_F(SecurityTest, FilesThatCannotBeTakenAreWarnedOf) {
  Config config;
  config.server = MutualTls();
  StartAlone(config.server);
  const rpc::TlsOptions tls = config.server.tls;
  int log_pipe[2];
  ASSERT_EQ(pipe2(log_pipe, O_NONBLOCK), 0);
  rpc::Log log(rpc::LogFormat::kText, log_pipe[1]);
  LiveConfig live(std::move(config), nullptr, &server(), &log);
  std::string text;
  const auto logged = [&](const std::string& wanted) {
    return Eventually([&] {
      live.Look();
      EXPECT_TRUE(log.Flush(absl::Seconds(30)));
      char bytes[4096];
      for (ssize_t count; (count = read(log_pipe[0], bytes, sizeof(bytes))) > 0;) {
        text.append(bytes, static_cast<size_t>(count));
      }
      return text.find(wanted) != std::string::npos;
    });
  };
  const std::string key = Read("key");
  Write("key", authority_.Sign({"DNS:other"}).key);
  EXPECT_TRUE(logged("is not the key of the first certificate")) << text;
  Write("key", key);
  EXPECT_TRUE(logged("can be taken again")) << text;
  std::filesystem::remove(tls.client_authorities);
  EXPECT_TRUE(logged("client-authorities")) << text;
  EXPECT_FALSE(rpc::CertificateExpiry(tls).ok());
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3) << text;
  close(log_pipe[0]);
  close(log_pipe[1]);
}

TEST_F(SecurityTest, TokensAreTenants) {
  StartAlone(Tokens());
  std::string tenant;
  Metadata both = Bearer(kPrefillToken);
  both.emplace_back("structkv-tenant", "decode");
  EXPECT_TRUE(Ask(channel(), &tenant, both).ok());
  EXPECT_EQ(tenant, "token:prefill");
  const std::string handle = Hold(channel(), Bearer(kPrefillToken));
  EXPECT_EQ(Fetch(channel(), FetchRequest(handle), Bearer(kDecodeToken)).status.error_code(),
            grpc::StatusCode::NOT_FOUND);
  EXPECT_TRUE(Fetch(channel(), FetchRequest(handle), Bearer(kPrefillToken)).status.ok());
  EXPECT_TRUE(Release(channel(), handle, Bearer(kPrefillToken)).ok());
  ExpectNothingHeld();
}

TEST_F(SecurityTest, TokensAreReadAgain) {
  StartAlone(Tokens());
  constexpr char kNext[] = "0011223344556677";
  EXPECT_EQ(Ask(channel(), nullptr, Bearer(kNext)).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  Write("tokens", std::string("prefill ") + kNext + "\n");
  EXPECT_TRUE(Eventually([&] { return Ask(channel(), nullptr, Bearer(kNext)).ok(); }));
  EXPECT_EQ(Ask(channel(), nullptr, Bearer(kPrefillToken)).error_code(),
            grpc::StatusCode::UNAUTHENTICATED);
  // One that cannot be taken changes nothing.
  Write("tokens", "prefill short\n");
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(1500);
  while (std::chrono::steady_clock::now() < end) {
    ASSERT_TRUE(Ask(channel(), nullptr, Bearer(kNext)).ok());
  }
}

// One tenant's share is taken, and the other's is not.
TEST_F(SecurityTest, TenantsHaveShares) {
  ServerOptions options = Tokens();
  options.sessions.tenants.max_sessions = 1;
  StartAlone(options);
  const PromptData data(SmallOpen(), 1);
  const auto run = [&](const char* token) {
    return testkit::Run(channel(), AllMessages(data), CallOptions{.metadata = Bearer(token)});
  };
  Call first(channel(), CallOptions{.metadata = Bearer(kPrefillToken)});
  first.Send(OpenMessage(data.open()));
  ASSERT_TRUE(first.WaitForOpened().has_value());
  const Outcome refused = run(kPrefillToken);
  ExpectFailure(refused, grpc::StatusCode::RESOURCE_EXHAUSTED,
                {"the tenant has 1 prompts and asks for 1; at most 1 are allowed "
                 "(--tenant-max-sessions)"});
  EXPECT_EQ(refused.trailers.count("grpc-retry-pushback-ms"), 1U);
  ExpectSuccess(data, run(kDecodeToken));
  first.Cancel();
  first.Finish();
  EXPECT_TRUE(Eventually([&] { return run(kPrefillToken).status.ok(); }));
  ExpectNothingHeld();
}

TEST_F(SecurityTest, SharesOfMemory) {
  ServerOptions options = Tokens();
  StartAlone(options);
  const PromptData data(SmallOpen(), 1);
  Call call(channel(), CallOptions{.metadata = Bearer(kPrefillToken)});
  call.Send(OpenMessage(data.open()));
  const std::optional<v1::Opened> opened = call.WaitForOpened();
  ASSERT_TRUE(opened.has_value());
  call.Cancel();
  call.Finish();

  options.sessions.tenants.memory_bytes = static_cast<int64_t>(opened->reserved_bytes()) - 1;
  Restart(options);
  const Outcome refused =
      testkit::Run(channel(), AllMessages(data), CallOptions{.metadata = Bearer(kPrefillToken)});
  ExpectFailure(refused, grpc::StatusCode::RESOURCE_EXHAUSTED,
                {"has 0 bytes of memory and asks for " + std::to_string(opened->reserved_bytes()),
                 "(--tenant-memory)"});
  EXPECT_EQ(refused.trailers.at("grpc-retry-pushback-ms"), "-1");  // it never fits
}

TEST_F(SecurityTest, SharesOfHeldCaches) {
  ServerOptions options = Tokens();
  StartAlone(options);
  const PromptData data(Held(SmallOpen()), 3);
  const auto hold = [&](const char* token) {
    return testkit::Run(channel(), AllMessages(data), CallOptions{.metadata = Bearer(token)});
  };
  const int64_t bytes = [&] {
    const std::string handle = Hold(channel(), Bearer(kPrefillToken));
    const int64_t held = server().sessions().held_caches().budget().reserved_bytes();
    EXPECT_TRUE(Release(channel(), handle, Bearer(kPrefillToken)).ok());
    return held;
  }();
  options.sessions.tenants.hold_bytes = 3 * bytes / 2;
  Restart(options);
  const Outcome first = hold(kPrefillToken);
  ASSERT_TRUE(first.status.ok()) << first.status.error_message();
  ExpectFailure(hold(kPrefillToken), grpc::StatusCode::RESOURCE_EXHAUSTED,
                {"bytes of held caches", "(--tenant-hold-budget)"});
  const Outcome other = hold(kDecodeToken);
  ASSERT_TRUE(other.status.ok()) << other.status.error_message();
  const auto release = [&](const Outcome& outcome, const char* token) {
    return Release(channel(), outcome.responses.back().summary().held().handle(), Bearer(token));
  };
  EXPECT_TRUE(release(first, kPrefillToken).ok());
  const Outcome again = hold(kPrefillToken);
  ASSERT_TRUE(again.status.ok()) << again.status.error_message();
  EXPECT_TRUE(release(again, kPrefillToken).ok());
  EXPECT_TRUE(release(other, kDecodeToken).ok());
  ExpectNothingHeld();
}

// What one tenant calls its prompts is nothing to another.
TEST_F(SecurityTest, KeysAndGroupsAreTheTenantsOwn) {
  StartAlone(Tokens());
  v1::Open open = SmallOpen();
  open.set_idempotency_key("request-17");
  const PromptData data(open, 1);
  Call first(channel(), CallOptions{.metadata = Bearer(kPrefillToken)});
  first.Send(OpenMessage(data.open()));
  ASSERT_TRUE(first.WaitForOpened().has_value());
  ExpectSuccess(data, testkit::Run(channel(), AllMessages(data),
                                   CallOptions{.metadata = Bearer(kDecodeToken)}));
  for (uint32_t layer = 0; layer < data.layers(); ++layer) first.Send(LayerMessage(data, layer));
  first.Send(CommitMessage(data));
  first.HalfClose();
  ExpectSuccess(data, first.Finish());

  // Ranks of two tenants wait for one another's in vain: each is alone in its group.
  const auto rank = [](uint32_t index) {
    v1::Open shard = SmallOpen();
    *shard.mutable_shard_group() = EvenShardGroup(shard, 2, index);
    return shard;
  };
  Call own(channel(), CallOptions{.metadata = Bearer(kPrefillToken)});
  own.Send(OpenMessage(rank(0)));
  ASSERT_TRUE(own.WaitForOpened().has_value());
  v1::Open other = rank(0);  // would be the same rank twice, and end the first
  other.set_model_id("another");
  Call strange(channel(), CallOptions{.metadata = Bearer(kDecodeToken)});
  strange.Send(OpenMessage(other));
  ASSERT_TRUE(strange.WaitForOpened().has_value());
  Call second(channel(), CallOptions{.metadata = Bearer(kPrefillToken)});
  second.Send(OpenMessage(rank(1)));
  EXPECT_TRUE(second.WaitForOpened().has_value());
  for (Call* call : {&own, &strange, &second}) {
    call->Cancel();
    call->Finish();
  }
  ExpectNothingHeld();
}

// A stream without a token is refused before anything of it is read.
TEST_F(SecurityTest, ABatchWithoutATokenIsOneRefusal) {
  StartAlone(Tokens());
  v1::Open open = SmallOpen();
  open.set_batch_prompt_count(1024);
  const Outcome outcome = testkit::Run(channel(), {OpenMessage(open)});
  EXPECT_EQ(outcome.status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(outcome.responses.empty());
  ExpectNothingHeld();
}

TEST(SecureByDefaultTest, NamesOfCertificatesNeedAuthorities) {
  ServerOptions options = TestOptions();
  options.identity.certificate_names = {"*"};
  EXPECT_EQ(Server::Start(options).status(),
            absl::InvalidArgumentError("client-names needs client-authorities: no certificate is "
                                       "asked for without them"));
}

TEST(SecureByDefaultTest, OtherHostsNeedTlsOrLeave) {
  ServerOptions options = TestOptions();
  options.listen = {"0.0.0.0:0"};
  const absl::Status refused = Server::Start(options).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(refused.message(),
            "listen is 0.0.0.0:0, which other hosts reach, and there is no TLS (tls-certificate, "
            "tls-key); insecure allows it");
  options.insecure = true;
  EXPECT_TRUE(Server::Start(options).ok());
}

}  // namespace
}  // namespace structkv::testkit
