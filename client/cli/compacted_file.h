// A compacted cache as a safetensors file, written layer by layer.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cli/safetensors_writer.h"
#include "structkv/result.h"
#include "structkv/v1/compression.pb.h"
#include "structkv/v1/held_cache.pb.h"

namespace structkv::cli {

// Takes the events of one prompt. Tensors: `layer.{i}.k`, `.v`, `.positions`, on request
// `.saliency`; `metrics.entropy`, `.sparsity`, `.variance` where the method has statistics;
// `metrics.transition` (NaN for layer 0) and on request `centrality` of StructKV;
// `skeleton.positions` where the method has a pivot. A plan has no keys and values, and a cache
// whose values are a part of the keys no `.v`; fp8 ones with scales have `.k_scale` and `.v_scale`
// as the capture had them; of GemFilter the filter layer alone has positions, metrics (NaN
// elsewhere) and saliency. Not thread-safe.
class CompactedFile {
 public:
  // `metadata` is the input's; the rest is added to it. Keys: `method`, `method.*` for every
  // parameter in force, `pivot_layer`, `pivot_mode` (what really answered), `decided_at_layer`, and
  // where they have a value `transition_layer`, `skeleton_from_layer`, `profiled_prompts`,
  // `values_in_keys` ("true"), `attention_scale`;
  // `logical_length`, `kv_length`, `next_position` (at which a decoder goes on), `fingerprint`,
  // `structkv_version`; `rotary.*` for every rotary parameter where keys were turned.
  static absl::StatusOr<std::unique_ptr<CompactedFile>> Create(
      const std::string& path, const v1::Open& open, const v1::Opened& opened,
      std::map<std::string, std::string> metadata);
  // The same file of a cache that was held, with the layers and heads that were fetched, without
  // what the pivot was, nor what the capture said of itself.
  static absl::StatusOr<std::unique_ptr<CompactedFile>> Create(const std::string& path,
                                                               const v1::CacheInfo& info);

  absl::Status Add(const client::LayerResult& layer);
  absl::Status Add(const client::PivotResult& pivot);
  // Gives the file its name.
  absl::Status Finish(const v1::Summary& summary);

 private:
  // What of a prompt the file has.
  struct Parts {
    uint32_t first_layer = 0;
    uint32_t end_layer = 0;
    bool pivot = true;
  };

  CompactedFile() = default;
  static absl::StatusOr<std::unique_ptr<CompactedFile>> Create(
      const std::string& path, const v1::Open& open, const v1::Opened& opened,
      std::map<std::string, std::string> metadata, const Parts& parts);

  std::unique_ptr<SafetensorsWriter> writer_;
  std::map<std::string, std::string> metadata_;
  bool has_metrics_ = false;
  bool has_pivot_ = false;
  bool has_transition_ = false;
  bool return_saliency_ = false;
  bool return_centrality_ = false;
  bool plan_ = false;
  bool key_scales_ = false;
  bool value_scales_ = false;
  bool values_in_keys_ = false;
  std::vector<float> entropy_, sparsity_, variance_, transition_;
};

}  // namespace structkv::cli
