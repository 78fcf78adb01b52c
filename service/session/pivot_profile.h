// The pivots that EXACT has found for each model, for prompts that want to know theirs from the
// start (PivotMode::kProfiled).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/engine/prompt_spec.h"

namespace structkv::session {

struct PivotProfileOptions {
  // Where the profile is kept, in a directory that can be written to. Empty: in memory alone. Two
  // servers must not share a file.
  std::string file;
  // Models that are remembered; the one not used for longest goes first.
  int64_t max_models = 1024;
  // How long what was learned may wait to be written, so that many prompts share one write.
  absl::Duration write_interval = absl::Seconds(1);
  // Called, from any thread, where the file had to be set aside or cannot be written. May be null.
  std::function<void(const std::string&)> warn;
};

// Thread-safe. A model is its id, its number of layers, and the parameters that EXACT depends on
// (sparsity ratio, weights, search range): pivots found with others say nothing about it.
class PivotProfile {
 public:
  // Reads the file. A damaged one is renamed to FILE.damaged (or .damaged-1, -2, ...), with a
  // warning, and the profile starts empty. NOT_FOUND, PERMISSION_DENIED and others where the file
  // cannot be read or its directory not be written to.
  static absl::StatusOr<std::shared_ptr<PivotProfile>> Open(PivotProfileOptions options);
  // Writes what was not written yet.
  ~PivotProfile();
  PivotProfile(const PivotProfile&) = delete;
  PivotProfile& operator=(const PivotProfile&) = delete;

  // Counts a prompt whose EXACT pivot is known. A prompt without a model id is not counted. Does
  // not wait for the file.
  void Record(const engine::PromptSpec& spec, int64_t pivot_layer);

  // Fills in spec->method.pivot.profiled_layer and profiled_prompts where the mode is kProfiled and
  // at least profile_min_prompts were counted: the layer found most often, the lowest at a tie.
  void Resolve(engine::PromptSpec* spec);

  // Writes what was not written yet, and waits until it is safe on the disk.
  absl::Status Flush();

  int64_t models() const;
  // Times that the file was written.
  int64_t writes() const;

 private:
  class Impl;
  explicit PivotProfile(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace structkv::session
