// The seam between the engine and what computes: every backend implements the same few operations
// on tensors.
//
// Contract, for every operation
//   * Shapes are given beside the pointers, strides count elements.
//   * Memory is the host's. Where BackendCapabilities::device_memory says so, the data of queries
//   and
//     keys, and of what rows are gathered from and to, may instead lie in the memory of a GPU, all
//     that a call gets in that of the same one. What is written there is there when the call
//     returns; what is read must not be written meanwhile.
//   * Outputs never overlap inputs unless the comment says so.
//   * Calls are synchronous and thread-safe: concurrent calls on distinct outputs are allowed.
//   * Parallel work goes through the caller's `ParallelFor`. Results do not depend on how it runs:
//   a backend
//     fixes its own tile boundaries and combines partial sums in tile order.
//   * Ties go to the lower position. NaN and Inf in the statistics are an error that names the
//   token; they
//     are never a silent choice.
//   * Errors: INVALID_ARGUMENT for values, RESOURCE_EXHAUSTED where a device's memory ran out,
//     INTERNAL for a fault of the backend, UNAVAILABLE where it is lost. On errors the outputs are
//     unspecified.
//
// tests/kernels/conformance holds every backend to this, against `reference`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend_stats.h"
#include "kernels/host_pinning.h"
#include "kernels/imported_memory.h"
#include "kernels/rotation.h"
#include "kernels/staged_layer.h"
#include "kernels/tensor.h"

namespace structkv {

// Runs task(0) .. task(count - 1), in any order and on any threads, and returns when all are done.
using ParallelFor = absl::FunctionRef<void(int64_t count, absl::FunctionRef<void(int64_t)> task)>;

// Makes the bytes of a run that begins at `offset` of what is to be filled.
using FillRun = absl::FunctionRef<void(int64_t offset, absl::Span<std::byte> run)>;

// Runs the tasks one after the other on the calling thread.
inline void SerialFor(int64_t count, absl::FunctionRef<void(int64_t)> task) {
  for (int64_t i = 0; i < count; ++i) task(i);
}

// Smoothing along the tokens.
enum class Pooling : uint8_t { kNone, kAvg, kMax };

// What a backend can compute, of keys (`dtypes`) and copy. Head sizes: multiples of `dim_step` in
// [min_dim, max_dim], and `extra_dims`.
struct BackendCapabilities {
  std::vector<DType> dtypes;
  std::vector<Layout> layouts;
  bool paged = false;          // keys and values in blocks of any size, see TensorView
  bool device_memory = false;  // tensors may lie in a GPU's memory, see the contract
  bool whole_layers = false;   // has RunLayer, and it is faster than the steps one by one
  int64_t min_dim = 32;
  int64_t max_dim = 256;
  int64_t dim_step = 8;
  std::vector<int64_t> extra_dims = {512, 576};
  int64_t max_window = 64;
  bool SupportsDim(int64_t dim) const {
    if (dim >= min_dim && dim <= max_dim && dim % dim_step == 0) return true;
    for (int64_t extra : extra_dims) {
      if (dim == extra) return true;
    }
    return false;
  }
};

// Inputs of local saliency (docs/method.md, section 1).
struct SaliencyParams {
  // [query_heads, window, key_dim]; query_heads is a multiple of the keys' heads. Row r of the
  // window is the query of token `keys.tokens - window + r`; it attends to keys 0 .. that token.
  TensorView queries;
  // [kv_heads, tokens, key_dim], dense or paged, of the queries' dtype; 8-bit keys take queries of
  // any wider dtype.
  TensorView keys;
  // [query_heads, window], natural log-sum-exp of each row's scaled scores; nullptr: computed.
  const float* lse = nullptr;
  // Factor of the scores; 0: 1 / sqrt(key_dim).
  float scale = 0.0F;
  // [kv_heads], what one unit of an element of that head's keys stands for, finite and above 0;
  // nullptr: 1.
  const float* key_scales = nullptr;
  // Whether the largest of the window's rows counts in place of their mean. Each query head then
  // needs a KV head for itself: query_heads == kv_heads (whose keys may be the same memory).
  bool window_max = false;
};

// A value in the statistics that is not finite (or negative, where it came from the worker).
struct BadStatistic {
  int64_t head = 0;   // KV head
  int64_t token = 0;  // lowest such token over all heads
  float value = 0.0F;
};

// Sums over a saliency vector S from which the layer's metrics follow (docs/method.md, section 3).
// All sums are accumulated in double precision.
struct SaliencySums {
  double total = 0;        // sum S
  double sum_s_log_s = 0;  // sum S ln S, 0 ln 0 = 0
  double sum_squares = 0;  // sum S^2
  double top_mass = 0;     // sum of the `top_count` largest S
};

// Inputs of a selection.
struct SelectParams {
  // [tokens], finite.
  const float* scores = nullptr;
  int64_t tokens = 0;
  // The last `window` tokens are always kept, whatever their scores.
  int64_t window = 0;
  // Tokens to keep in all, window <= keep <= tokens: the window and the best keep - window of the
  // others.
  int64_t keep = 0;
};

struct LayerPass;       // kernels/layer_pass.h
class ResidentVectors;  // kernels/resident_vectors.h

// Implementations: reference (scalar double precision, the oracle), cpu (SIMD), cuda (NVIDIA GPUs).
class Backend {
 public:
  virtual ~Backend() = default;

  // Registry name, for instance "cpu".
  virtual std::string_view name() const = 0;
  // What computes, for people, for instance "AVX-512 BF16".
  virtual std::string device() const = 0;
  virtual const BackendCapabilities& capabilities() const = 0;

  // OK, until what computes is lost for good: UNAVAILABLE with the cause. From then on operations
  // return at once and what they write is unspecified, so whoever uses results asks after the
  // operations that made them. Only a new process can do better.
  virtual absl::Status Health() const { return absl::OkStatus(); }

  // Whether Saliency, for lack of a log-sum-exp, keeps this call's weights as float16 between two
  // passes: each is then rounded to 11 bits, and off by up to 2^-25 of its row's largest. A
  // function of shapes and types alone.
  virtual bool KeepsHalfWeights(const SaliencyParams& /*params*/) const { return false; }

  // Bytes of scratch memory that one Saliency call takes at most; counted in a prompt's
  // reservation.
  virtual int64_t SaliencyScratchBytes(const SaliencyParams& params) const = 0;

  // RESOURCE_EXHAUSTED, with the bytes that are needed and those that there are, where Saliency of
  // such tensors never has the device memory that it takes, whoever else uses it. Their data are
  // not looked at; `keys_on_device`: the keys will lie in a GPU's memory.
  virtual absl::Status CheckRoom(const SaliencyParams& /*params*/, bool /*keys_on_device*/) const {
    return absl::OkStatus();
  }

  // Writes out[g, j] = (1 / window) * sum over the window's rows t and the query heads h of group g
  // of a[h, t, j], the softmax attention over keys 0 .. t; with `window_max` out[h, j] = max over t
  // of a[h, t, j]. `out` is [kv_heads, tokens], float32, not null. Where a score is not finite the
  // call returns INVALID_ARGUMENT and, if `bad` is not null, fills it.
  virtual absl::Status Saliency(const SaliencyParams& params, float* out, BadStatistic* bad,
                                ParallelFor parallel) const = 0;

  // Writes out[j] = sum over heads, in head order, of per_head[h, j]. `per_head` is [heads,
  // tokens].
  virtual void SumHeads(const float* per_head, int64_t heads, int64_t tokens, float* out,
                        ParallelFor parallel) const = 0;

  // Finds the lowest token at which any head's value is NaN, infinite or negative (of several heads
  // the lowest). `values` is [heads, tokens].
  virtual std::optional<BadStatistic> FindBad(const float* values, int64_t heads, int64_t tokens,
                                              ParallelFor parallel) const = 0;

  // Smooths `in` into `out`, both [tokens], over an odd `kernel` centred on each token. The mean
  // divides by `kernel` everywhere and takes places beyond the edges as zero; the maximum leaves
  // them out.
  virtual void Pool(const float* in, int64_t tokens, Pooling pooling, int64_t kernel,
                    float* out) const = 0;

  // Sums over scores[0 .. tokens) for the layer's metrics, values finite and not negative.
  virtual SaliencySums Sums(const float* scores, int64_t tokens, int64_t top_count,
                            ParallelFor parallel) const = 0;

  // centrality[j] = decay * centrality[j] + saliency[j], in place, both [tokens].
  virtual void Accumulate(float decay, const float* saliency, float* centrality, int64_t tokens,
                          ParallelFor parallel) const = 0;

  // Writes the kept positions, ascending, to `positions` ([keep], not null).
  virtual void Select(const SelectParams& params, int32_t* positions) const = 0;

  // Copies the rows at `positions` of every head. `positions` is [kept] for all heads alike or
  // [heads, kept]; `per_head` says which. `destination` has the source's heads, dim and dtype and
  // `kept` tokens, and may be paged whether or not the source is; what lies behind its tokens in a
  // last block is not written. Positions must lie in the source. Of tensors in the host's memory
  // only a lost backend is an error.
  virtual absl::Status Gather(const TensorView& source, const int32_t* positions, bool per_head,
                              const MutableTensorView& destination, ParallelFor parallel) const = 0;

  // As Gather, for keys of F32, F16 or BF16, with each of them moved to another position on its
  // way (kernels/rotation.h). Row i of a head is the key at rows[.., i], which was rotated for
  // rotation.positions[.., i].
  virtual absl::Status GatherRotated(const TensorView& source, const int32_t* rows, bool per_head,
                                     const RotationParams& rotation,
                                     const MutableTensorView& destination,
                                     ParallelFor parallel) const = 0;

  // Does all of `pass`, and fills `bad`, as Saliency does; so are the errors. UNIMPLEMENTED, and
  // nothing was done, where the caller has to take the steps one by one.
  virtual absl::Status RunLayer(const LayerPass& pass, BadStatistic* bad,
                                ParallelFor parallel) const;

  // Begins to bring a layer's keys to where a RunLayer with `params` will want them
  // (LayerPass::staged), while another layer is computed; returns at once. Null where that is of no
  // use, or where there is no room now: that call then does without. Results are the same. `gpu`:
  // where the prompt's resident vectors lie; -1: nowhere yet, or not on a GPU.
  virtual std::unique_ptr<StagedLayer> Stage(const SaliencyParams& /*params*/, int /*gpu*/) const {
    return nullptr;
  }

  // Room for vectors of a prompt (kernels/resident_vectors.h), never null: on the GPU that layers
  // with such `keys`, which may be `staged` (null: they are not), are computed on, where that has
  // the room now, or else in the host's memory. Results are the same. Waits for nothing.
  virtual std::unique_ptr<ResidentVectors> Resident(int64_t count, int64_t tokens, const void* keys,
                                                    const StagedLayer* staged) const;

  // Sets `bytes` bytes to zero, of memory that a gather may write to. Errors as of Gather.
  virtual absl::Status Zero(void* to, int64_t bytes) const {
    std::memset(to, 0, static_cast<size_t>(bytes));
    return absl::OkStatus();
  }

  // The GPUs that compute, by CUDA's numbers; none without BackendCapabilities::device_memory.
  virtual std::vector<int> gpus() const { return {}; }
  // Memory of one of them that tensors may lie in, apart from what calls take for themselves, until
  // the last share of it is gone, which may outlive the backend; begins at a multiple of 256.
  // RESOURCE_EXHAUSTED, with the numbers, where not so much is free; waits for nothing.
  virtual absl::StatusOr<std::shared_ptr<std::byte>> Reserve(int gpu, int64_t bytes) const;
  // The most that Reserve can give at once, when nobody else has any.
  virtual int64_t reservable_bytes(int /*gpu*/) const { return 0; }
  // Has `fill` make `bytes` bytes, in order and on the calling thread, run by run of the host's
  // memory, and puts them into memory that a gather may write to. Errors as of Gather.
  virtual absl::Status Fill(void* to, int64_t bytes, FillRun fill) const {
    if (bytes > 0) fill(0, {static_cast<std::byte*>(to), static_cast<size_t>(bytes)});
    return absl::OkStatus();
  }

  // For host memory that tensors are received in: from what is pinned a device copies, and gathers
  // rows, by itself. Nothing to pin without a device.
  virtual HostPinning host_pinning() const { return {}; }

  // For whoever watches; to be called now and then.
  virtual BackendStats stats() const { return {}; }

  // Opens memory that a process has exported, so that tensors may lie in it. May outlive the
  // backend. FAILED_PRECONDITION without BackendCapabilities::device_memory, and where the memory
  // cannot be opened; INVALID_ARGUMENT for a GPU that does not compute here, and for a size that
  // the allocation has not.
  virtual absl::StatusOr<std::unique_ptr<ImportedMemory>> Import(
      const ExportedMemory& exported) const;
};

}  // namespace structkv
