// Runs the prompts of `structkv bench`.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/cli/bench_flags.h"
#include "client/cli/bench_hold.h"
#include "client/cli/compressor.h"
#include "client/cli/shared_memory.h"
#include "client/cli/synthetic.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// A prompt that is sent over and over; of a prompt of several ranks, one rank's part.
struct BenchPrompt {
  v1::Open open;
  v1::Opened opened;  // what the service answers to it
  std::unique_ptr<SyntheticPrompt> tensors;
  SharedMemory memory;  // of all prompts
};

// What a worker sends at a time: the ranks of a prompt, each in a stream of its own, or the prompts
// of a batch in one stream. `compressor` is asked what it answers to them.
absl::StatusOr<std::vector<BenchPrompt>> MakeBenchPrompts(const BenchFlags& flags,
                                                          Compressor& compressor);

// What the prompts of a run have measured. Guarded by `mutex` while they run.
struct BenchFigures {
  absl::Mutex mutex;
  std::vector<double> prompt_seconds;
  std::vector<double> layer_seconds;
  uint64_t input_bytes = 0;
  uint64_t output_bytes = 0;
  uint64_t compute_micros = 0;
  uint64_t queue_micros = 0;
  std::string backend;
  std::string transport;         // of the last prompt
  std::string transport_reason;  // likewise: why not a better one
  FetchFigures fetches;          // with --hold
  double hold_cpu_seconds = 0;   // of this process while the prompts ran that were held
  absl::Status status;
  double wall_seconds = 0;
};

// Connections that RunBenchPrompts() needs: one for each worker and rank; the engine in this
// process is shared.
uint32_t BenchConnections(const BenchFlags& flags);

// Runs `flags.prompts` prompts and shows how far they are. The figures, or their first error.
void RunBenchPrompts(const BenchFlags& flags,
                     const std::vector<std::unique_ptr<Compressor>>& compressors,
                     const std::vector<BenchPrompt>& prompts, BenchFigures* figures);

}  // namespace structkv::cli
