// Where the commands' prompts are compressed: by a server, or in this process.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/cli/connect.h"
#include "structkv/compress.h"
#include "structkv/nccl.h"
#include "structkv/options.h"
#include "structkv/region.h"
#include "structkv/result.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// Thread-safe.
class Compressor {
 public:
  virtual ~Compressor() = default;

  // Compresses a prompt; like client::StreamPrompt. `options.on_opened` is called before the source
  // is asked for its first layer, `options.on_event` once per event, from any thread.
  virtual absl::StatusOr<v1::Summary> Run(const v1::Open& open, client::LayerSource source,
                                          const client::SessionOptions& options) = 0;

  // The same, one layer after the other; like client::StreamPromptInSteps.
  virtual absl::StatusOr<v1::Summary> RunInSteps(const v1::Open& open, client::SteppedSource source,
                                                 const client::SessionOptions& options) = 0;

  // The prompts of a batch; like client::StreamBatch.
  virtual std::vector<absl::StatusOr<v1::Summary>> RunBatch(
      absl::Span<const client::BatchPrompt> prompts, client::BatchSource source,
      const client::StreamOptions& options) = 0;

  virtual absl::StatusOr<v1::GetCapabilitiesResponse> GetCapabilities() = 0;

  // What is known of the servers, where it may be one of several.
  virtual std::vector<client::ReplicaState> Replicas() const { return {}; }

  // Where it runs, for people.
  virtual std::string description() const = 0;

  // Runs a prompt and collects its results.
  absl::StatusOr<client::Compressed> Collect(const v1::Open& open, client::LayerSource source,
                                             client::SessionOptions options);
};

// `opened` as it would be if nothing were pulled (`Open.pull`): the tensors that a source must
// have.
v1::Opened WithPulledTensors(const v1::Open& open, v1::Opened opened);

struct ConnectionFlags {
  std::string server = "127.0.0.1:7411";
  std::string tenant;
  SecurityFlags security;
  bool in_process = false;
  std::string backend = "auto";
  int threads = 0;
  double timeout_seconds = 0;
  client::TransportChoice transport = client::TransportChoice::kAuto;
  int gpu = 0;
  std::string cuda_library = client::RegionOptions().cuda_library;
  std::string nccl_library = client::NcclOptions().nccl_library;
};

// --server, --tenant, --timeout and those of SecurityFlags alone; returns --server.
CLI::Option* AddServerFlags(CLI::App* app, ConnectionFlags* flags);
void AddConnectionFlags(CLI::App* app, ConnectionFlags* flags);

// The metadata that name the tenant.
std::vector<std::pair<std::string, std::string>> TenantMetadata(const ConnectionFlags& flags);

// The timeout, tenant and transport of the flags, on top of the defaults.
client::SessionOptions MakeSessionOptions(const ConnectionFlags& flags);

// Connects, or sets up this process. Every call makes a connection of its own.
absl::StatusOr<std::unique_ptr<Compressor>> MakeCompressor(const ConnectionFlags& flags);

}  // namespace structkv::cli
