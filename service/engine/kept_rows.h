// The rows of a layer's keys or values that stay, and the room that they go to.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/layer_pass.h"
#include "kernels/rotation.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/prompt_spec.h"
#include "service/engine/shard.h"

namespace structkv::engine {

// A tensor of which some rows stay.
struct KeptTensor {
  HeadRange heads;      // of the model's KV heads
  TensorView all;       // those heads
  int64_t kept = 0;     // rows of each head
  bool turned = false;  // they are keys that are turned on their way
};

// Whether nothing has to be gathered, since the tensor is its own compaction: `source`, what it
// lies in, can be handed out. `room`: where its rows are to be written, where that is not empty.
bool StaysWhole(const PromptSpec& spec, const KeptTensor& tensor, const Buffer& source,
                const Buffer& room);

class KeptRows {
 public:
  // Takes `room`, or where that is empty some from `pool`, and sets what of it lies behind the last
  // row to zero. Errors as of Backend::Zero. The tensor has to live until its rows are gathered.
  static absl::StatusOr<KeptRows> Plan(const PromptSpec& spec, const Backend& backend,
                                       BufferPool& pool, const KeptTensor& tensor, Buffer room);

  // What is to be gathered, heads counted from the tensor's first.
  const std::vector<LayerPass::Rows>& runs() const { return runs_; }

  // Gathers all runs. `positions` as LayerOutput's; `rotation`: keys are turned; null: nothing is.
  absl::Status Gather(const PromptSpec& spec, const Backend& backend, const int32_t* positions,
                      const RotationParams* rotation, ParallelFor parallel) const;

  // The rows, once they are gathered.
  Buffer Take() && { return std::move(rows_); }

 private:
  Buffer rows_;
  std::vector<LayerPass::Rows> runs_;
  int64_t kept_ = 0;
};

}  // namespace structkv::engine
