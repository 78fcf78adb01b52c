// A layer of Llama-3.1-8B's geometry (32 query heads, 8 KV heads of 128, window 8, bf16) at 10 %,
// step by step and as a whole.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/gather.h"
#include "kernels/cuda/saliency.h"
#include "kernels/cuda/select.h"
#include "kernels/cuda/statistics.h"
#include "tests/gpu/bench_timing.h"
#include "tests/gpu/device_data.h"

namespace structkv::gpu {

// Layers' keys and values lie in buffers that together are larger than the L2 cache several times
// over and are used in turns, so that every layer's come from device memory.
class LayerBench {
 public:
  LayerBench(int64_t tokens, int64_t l2_bytes);

  std::vector<Row> Measure(Events* events);

 private:
  struct Layer {
    DeviceBytes keys, values;            // [kv_heads, tokens, dim]
    DeviceBytes kept_keys, kept_values;  // [kv_heads, kept, dim]
  };

  // Of buffer `layer`, on the default stream.
  void Saliency(const Layer& layer, bool with_lse, bool per_head) const;
  void Select() const;
  void Gather(const Layer& layer, bool in_blocks) const;
  void GatherRotated(const Layer& layer) const;

  cuda::SaliencyRequest Request(const Layer& layer, bool with_lse, bool per_head) const;
  cuda::SelectRow SelectRow() const;
  cuda::GatherJob Job(const DeviceBytes& from, const DeviceBytes& to, bool in_blocks) const;
  // Microseconds of `step` for one layer, of `layers` that follow each other.
  template <class Step>
  double Micros(Events* events, int layers, const Step& step) const;

  const int64_t tokens_;
  const int64_t kept_;
  std::vector<Layer> layers_;
  const DeviceBytes queries_, lse_;
  const DeviceBytes per_head_, saliency_, centrality_, flags_;
  const DeviceBytes parts_, sums_, positions_;
  const DeviceBytes block_table_, frequencies_;
  cuda::SelectLimits limits_;
  std::vector<DeviceBytes> workspace_, scratch_;  // one each, of a size that the others tell
};

}  // namespace structkv::gpu
