// A prompt's layers over one transport, and what that took.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/cli/compressor.h"
#include "client/cli/synthetic.h"
#include "structkv/arena.h"
#include "structkv/nccl.h"
#include "structkv/v1/compression.pb.h"
#include "tests/bench/copy_count.h"

namespace structkv::bench {

// What is sent: prompts of one kind, and what a service says of them.
struct RouteLoad {
  v1::Open open;
  v1::Opened opened;

  uint64_t request_bytes() const;  // of a layer
  uint64_t answer_bytes() const;   // of a layer's rows
  uint64_t key_value_bytes() const;
  // Room for the tensors and for the results of two prompts.
  uint64_t region_bytes() const;
};

// Prompts of the model of that name with `tokens` tokens in bf16 with window queries, StructKV at
// 10 %. Ends the program where there is no such model.
v1::Open RouteOpen(const std::string& geometry, uint32_t tokens);

// Compresses at the server, or in this process where it is empty. Ends the program on an error.
std::unique_ptr<cli::Compressor> CompressorAt(const std::string& server,
                                              const std::string& backend);

// How layers travel.
struct RouteSetup {
  client::TransportChoice transport = client::TransportChoice::kInline;
  int64_t server_pid = 0;                // 0: none
  std::shared_ptr<client::Arena> arena;  // where rows that stay go; null: they come in messages
  std::shared_ptr<client::NcclGpu> nccl;
  std::function<client::LayerTensors(uint32_t layer)> layer;
  // Microseconds of the bare transport for each layer of a prompt; null: nothing but the
  // arithmetic.
  std::function<std::vector<double>()> floor;
  bool floor_computes = true;  // whether the arithmetic comes on top of it
};

// Prompts over one transport, of one thread. `load` outlives it.
class Route {
 public:
  Route(std::string name, const RouteLoad* load, std::unique_ptr<cli::Compressor> compressor,
        RouteSetup setup);

  // A prompt, one layer after the other: latencies.
  absl::Status Step();
  // A prompt, all layers at once: rates.
  absl::Status Stream();
  // The floor of a prompt's layers.
  void RunFloor();
  // What was measured so far was to warm up.
  void Clear();

  const std::string& name() const { return name_; }
  bool floor_computes() const { return setup_.floor_computes; }
  const std::string& transport_name() const { return transport_name_; }
  const std::vector<double>& micros() const { return micros_; }
  const std::vector<double>& floor_micros() const { return floor_micros_; }
  double compute_mean_micros() const { return compute_micros_ / static_cast<double>(layers_); }
  double seconds() const { return seconds_; }
  double cpu_seconds() const { return cpu_seconds_; }
  double gigabytes() const { return static_cast<double>(bytes_) / 1e9; }
  // While all layers were sent at once; nullopt where nobody counts.
  const std::optional<Copies>& copies() const { return copies_; }

 private:
  client::SessionOptions Options() const;
  double CpuSeconds() const;

  const std::string name_;
  const RouteLoad* const load_;
  const std::unique_ptr<cli::Compressor> compressor_;
  const RouteSetup setup_;
  std::string transport_name_;
  std::vector<double> micros_;
  std::vector<double> floor_micros_;
  uint64_t layers_ = 0;        // of `micros_`
  double compute_micros_ = 0;  // of those, as the service has it
  double seconds_ = 0;
  double cpu_seconds_ = 0;
  uint64_t bytes_ = 0;  // of tensors, both ways
  std::optional<Copies> copies_;
};

}  // namespace structkv::bench
