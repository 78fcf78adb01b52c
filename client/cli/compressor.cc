#include "client/cli/compressor.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "client/cli/in_process.h"
#include "structkv/client.h"

namespace structkv::cli {
namespace {

class RemoteCompressor final : public Compressor {
 public:
  RemoteCompressor(std::string server, std::unique_ptr<client::Client> client)
      : server_(std::move(server)), client_(std::move(client)) {}

  absl::StatusOr<v1::Summary> Run(const v1::Open& open, client::LayerSource source,
                                  const client::SessionOptions& options) override {
    return Named(client::StreamPrompt(*client_, open, source, options));
  }

  absl::StatusOr<v1::Summary> RunInSteps(const v1::Open& open, client::SteppedSource source,
                                         const client::SessionOptions& options) override {
    return Named(client::StreamPromptInSteps(*client_, open, source, options));
  }

  std::vector<absl::StatusOr<v1::Summary>> RunBatch(absl::Span<const client::BatchPrompt> prompts,
                                                    client::BatchSource source,
                                                    const client::StreamOptions& options) override {
    auto summaries = client::StreamBatch(*client_, prompts, source, options);
    for (auto& summary : summaries) summary = Named(std::move(summary));
    return summaries;
  }

  absl::StatusOr<v1::GetCapabilitiesResponse> GetCapabilities() override {
    return Named(client_->GetCapabilities());
  }

  std::vector<client::ReplicaState> Replicas() const override { return client_->Replicas(); }

  std::string description() const override { return absl::StrCat("server ", server_); }

 private:
  // A server that cannot be reached is named; of several the client names it.
  template <typename T>
  absl::StatusOr<T> Named(absl::StatusOr<T> result) const {
    if (result.ok() || !absl::IsUnavailable(result.status()) || Replicas().size() != 1 ||
        Replicas()[0].address != server_) {
      return result;
    }
    return absl::UnavailableError(absl::StrCat(server_, ": ", result.status().message()));
  }

  const std::string server_;
  const std::unique_ptr<client::Client> client_;
};

}  // namespace

absl::StatusOr<client::Compressed> Compressor::Collect(const v1::Open& open,
                                                       client::LayerSource source,
                                                       client::SessionOptions options) {
  client::Compressed compressed;
  options.on_opened = [&compressed, next = std::move(options.on_opened)](const v1::Opened& opened) {
    compressed.opened = opened;
    if (next) next(opened);
  };
  options.on_event = [&compressed](client::Event event) {
    if (auto* layer = std::get_if<client::LayerResult>(&event)) {
      compressed.layers.push_back(std::move(*layer));
    } else if (auto* pivot = std::get_if<client::PivotResult>(&event)) {
      compressed.pivot = std::move(*pivot);
    }
  };
  absl::StatusOr<v1::Summary> summary = Run(open, source, options);
  if (!summary.ok()) return summary.status();
  compressed.summary = *std::move(summary);
  std::sort(compressed.layers.begin(), compressed.layers.end(),
            [](const auto& a, const auto& b) { return a.layer < b.layer; });
  return compressed;
}

v1::Opened WithPulledTensors(const v1::Open& open, v1::Opened opened) {
  const bool keys = open.pull() == v1::PULL_KEYS_AND_VALUES;
  if (keys) opened.add_required_tensors(v1::TENSOR_KEYS);
  if (keys || open.pull() == v1::PULL_VALUES) opened.add_required_tensors(v1::TENSOR_VALUES);
  return opened;
}

namespace {
constexpr char kGroup[] = "Where";
}  // namespace

CLI::Option* AddServerFlags(CLI::App* app, ConnectionFlags* flags) {
  app->add_option("--tenant", flags->tenant,
                  "Whose held caches these are, where the connection does not say")
      ->group(kGroup);
  app->add_option("--timeout", flags->timeout_seconds, "Seconds for one prompt; 0: none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->group(kGroup);
  AddSecurityFlags(app, &flags->security, kGroup);
  return app
      ->add_option("--server", flags->server,
                   "Address of the server: host:port or unix:/path; of several: ADDRESS,ADDRESS or "
                   "dns:///name:port")
      ->capture_default_str()
      ->group(kGroup);
}

void AddConnectionFlags(CLI::App* app, ConnectionFlags* flags) {
  CLI::Option* server = AddServerFlags(app, flags);
  CLI::Option* in_process =
      app->add_flag("--in-process", flags->in_process, "Compress in this process, without a server")
          ->excludes(server)
          ->group(kGroup);
  app->add_option("--backend", flags->backend,
                  "With --in-process: auto, cuda (where built with it), cpu or reference")
      ->needs(in_process)
      ->capture_default_str()
      ->group(kGroup);
  app->add_option("--threads", flags->threads,
                  "With --in-process: compute threads; 0: one per core")
      ->check(CLI::Range(0, 1024))
      ->needs(in_process)
      ->capture_default_str()
      ->group(kGroup);
}

std::vector<std::pair<std::string, std::string>> TenantMetadata(const ConnectionFlags& flags) {
  if (flags.tenant.empty()) return {};
  return {{"structkv-tenant", flags.tenant}};
}

client::SessionOptions MakeSessionOptions(const ConnectionFlags& flags) {
  client::SessionOptions options;
  options.transport = flags.transport;
  if (flags.timeout_seconds > 0) options.timeout = absl::Seconds(flags.timeout_seconds);
  options.metadata = TenantMetadata(flags);
  return options;
}

absl::StatusOr<std::unique_ptr<Compressor>> MakeCompressor(const ConnectionFlags& flags) {
  if (flags.in_process) return MakeInProcessCompressor(flags.backend, flags.threads);
  auto client = ConnectTo(flags.server, flags.security);
  if (!client.ok()) return client.status();
  return std::make_unique<RemoteCompressor>(flags.server, *std::move(client));
}

}  // namespace structkv::cli
