// A layer of Llama-3.1-8B's geometry (32 query heads, 8 KV heads of 128, window 8, bf16) at 10 %,
// step by step and as a whole.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/gather.h"
#include "kernels/cuda/saliency.h"
#include "kernels/cuda/select.h"
#include "tests/gpu/bench_timing.h"
#include "tests/gpu/device_data.h"

namespace structkv::gpu {

// Layers' keys and values lie in buffers that together are larger than the L2 cache several times
// over and are used in turns, so that every layer's come from device memory.
class LayerBench {
 public:
  LayerBench(int64_t tokens, int64_t l2_bytes);
  ~LayerBench();
  LayerBench(const LayerBench&) = delete;
  LayerBench& operator=(const LayerBench&) = delete;

  std::vector<Row> Measure(Events* events);

 private:
  struct Layer {
    DeviceBytes keys, values;  // [kv_heads, tokens, dim]
  };
  // What a prompt that is computed has beside its layers, and its stream.
  struct Lane {
    explicit Lane(int64_t tokens, int64_t kept);

    cudaStream_t stream = nullptr;  // the default one
    cudaEvent_t done = nullptr;
    DeviceBytes per_head, saliency, centrality, flags;
    DeviceBytes parts, sums, positions;
    DeviceBytes kept_keys, kept_values;           // [kv_heads, kept, dim]
    std::vector<DeviceBytes> workspace, scratch;  // one each, of a size that the others tell
  };

  // Of one layer, on the lane's stream.
  void Saliency(const Layer& layer, const Lane& lane, bool with_lse, bool per_head) const;
  void Select(const Lane& lane) const;
  void Gather(const Layer& layer, const Lane& lane, bool in_blocks) const;
  void GatherRotated(const Layer& layer, const Lane& lane) const;
  void All(const Layer& layer, const Lane& lane, bool with_lse) const;

  cuda::SaliencyRequest Request(const Layer& layer, const Lane& lane, bool with_lse,
                                bool per_head) const;
  cuda::SelectRow SelectRow(const Lane& lane) const;
  cuda::GatherJob Job(const DeviceBytes& from, const DeviceBytes& to, const Lane& lane,
                      bool in_blocks) const;
  const Layer& LayerAt(int layer) const {
    return layers_[static_cast<size_t>(layer) % layers_.size()];
  }
  // Microseconds of `step` for one layer, of `layers` that follow each other in the first lane.
  template <class Step>
  double Micros(Events* events, int layers, const Step& step) const;
  // The same of all steps, of `layers` that the lanes take in turns.
  double MicrosInAllLanes(Events* events, int layers, bool with_lse) const;
  void ExpectFinite() const;

  const int64_t tokens_;
  const int64_t kept_;
  std::vector<Layer> layers_;
  const DeviceBytes queries_, lse_;
  const DeviceBytes block_table_, frequencies_;
  cuda::SelectLimits limits_;
  std::vector<Lane> lanes_;
  cudaEvent_t begun_ = nullptr;
};

}  // namespace structkv::gpu
