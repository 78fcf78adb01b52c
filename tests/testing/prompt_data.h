// Synthetic prompts: what a worker would send for an `Open`, from a seed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "structkv/v1/compression.pb.h"
#include "tests/testing/numbers.h"

namespace structkv::testkit {

// A small model in bf16, [kv_head, token, dim], StructKV with its defaults. 4 layers, 4 query and 2
// KV heads of 32.
v1::Open SmallOpen(uint32_t tokens = 200);

// Has the prompt's keys and values lie in a pool of its blocks and `spare` others, in an order that
// `seed` chooses.
void PageAtRandom(uint32_t block_tokens, uint32_t spare, uint64_t seed, v1::Open* open);

// What docs and proto promise for an `Open` where a field is unset. Written down here again, so
// that the server's own defaults are what is tested.
struct Effective {
  explicit Effective(const v1::Open& open);

  bool structkv = false;
  bool snapkv = false;
  bool streaming = false;
  bool full = false;
  bool pyramidkv = false;
  bool fastkv = false;
  bool gemfilter = false;
  bool h2o = false;
  v1::Statistic statistic = v1::STATISTIC_NONE;
  bool plan = false;
  bool per_head = false;
  uint32_t window = 0;                     // min(w, N)
  uint32_t kept = 0;                       // the mean of the layers
  uint32_t largest = 0;                    // of the layers
  uint32_t always = 0;                     // last tokens that are kept whatever their scores
  std::vector<uint32_t> layers;            // tokens that each layer keeps
  std::optional<uint32_t> skeleton_layer;  // that alone chooses the skeleton
  v1::WindowReduce window_reduce = v1::WINDOW_REDUCE_MEAN;
  v1::GroupReduce reduce = v1::GROUP_REDUCE_SUM;
  uint32_t skeleton = 0;
  uint32_t sinks = 0;
  v1::Pooling pooling = v1::POOLING_NONE;
  uint32_t kernel = 5;
  uint32_t value_dim = 0;
  v1::DType query_dtype = v1::DTYPE_UNSPECIFIED;
  uint32_t scales = 0;  // elements of a tensor of scales
  // Tensors that every layer needs that keeps tokens, in the order of their numbers.
  std::vector<v1::Tensor> tensors;
};

// Every tensor of every layer. Elements are multiples of 1/64 that each dtype holds exactly (of
// fp8, what is nearest to them); the statistics differ from layer to layer. Paged keys and values
// are the dense ones, put into their blocks; every other slot holds NaN.
class PromptData {
 public:
  PromptData(const v1::Open& open, uint64_t seed);

  const v1::Open& open() const { return open_; }
  const Effective& effective() const { return effective_; }
  uint32_t layers() const { return open_.geometry().layer_count(); }
  // Empty where the prompt does not have the tensor.
  const std::string& tensor(uint32_t layer, v1::Tensor tensor) const;
  std::string* mutable_tensor(uint32_t layer, v1::Tensor tensor);
  // Bytes of all tensors.
  uint64_t total_bytes() const;

  // Where the keys (and values) of a token of a layer lie, counted in vectors of the tensor.
  uint64_t RowIndex(uint32_t layer, uint64_t head, uint64_t token) const;

  // Leaves a layer the rows of `skeleton` alone, with the skeleton as TENSOR_POSITIONS.
  void KeepRows(uint32_t layer, const std::vector<int32_t>& skeleton);
  // Leaves the heads of a shard alone, and says so in `open`; both ranges are set. Saliency of a KV
  // head that `sharers` ranks have, or of all ranks together, is divided by that number: exact for
  // a power of two.
  void KeepHeads(const v1::ShardGroup& group, uint32_t sharers);
  void set_shard_group(const v1::ShardGroup& group) { *open_.mutable_shard_group() = group; }
  // The tokens of a layer that KeepRows has cut; empty: all.
  const std::vector<int32_t>& rows(uint32_t layer) const { return rows_[layer]; }
  // Tokens that a layer has.
  uint32_t tokens(uint32_t layer) const {
    return rows_[layer].empty() ? open_.prompt_tokens()
                                : static_cast<uint32_t>(rows_[layer].size());
  }
  // What a profile says for a prompt of PIVOT_MODE_PROFILED; unset: ONLINE answers.
  std::optional<uint32_t> profiled_layer;

 private:
  void FillLayer(uint32_t layer, Random* random);
  // From the oracle's scores, once all that these depend on is there.
  void FillLse(uint32_t layer);
  // Puts the dense keys or values of `tokens` into blocks: of the table, or in order.
  void Page(uint32_t layer, v1::Tensor tensor, uint64_t tokens, bool in_order);

  v1::Open open_;
  Effective effective_;
  std::vector<std::vector<std::string>> tensors_;  // by layer and v1::Tensor
  std::vector<std::vector<int32_t>> rows_;         // by layer
};

// Heads `range` of a tensor of `runs` runs, each [heads, ...].
std::string SliceHeads(const std::string& tensor, uint64_t runs, uint64_t heads,
                       const v1::HeadRange& range);

// Where kept token `i` of `kept` lies in a result's keys (and values), counted in vectors, and how
// many vectors there are.
uint64_t OutputRowIndex(const v1::Open& open, uint64_t kept, uint64_t head, uint64_t i);
uint64_t OutputRows(const v1::Open& open, uint64_t kept);

// A piece of a tensor, by copy.
v1::TensorPiece MakePiece(const PromptData& data, uint32_t layer, v1::Tensor tensor,
                          uint64_t offset, uint64_t size);
// A whole tensor in one piece.
v1::TensorPiece MakePiece(const PromptData& data, uint32_t layer, v1::Tensor tensor);

// The keys and values of tokens [first, first + tokens) of a full layer: a piece for each run that
// lies together in its tensor.
std::vector<v1::TensorPiece> ChunkPieces(const PromptData& data, uint32_t layer, uint32_t first,
                                         uint32_t tokens);

// Messages.
v1::CompressRequest OpenMessage(const v1::Open& open);
v1::CompressRequest PieceMessage(v1::TensorPiece piece);
v1::CompressRequest LayerMessage(const PromptData& data, uint32_t layer);
v1::CompressRequest CommitMessage(uint32_t layers, uint64_t bytes);
v1::CompressRequest CommitMessage(const PromptData& data);

// Every message of the prompt: open, a message per layer, commit.
std::vector<v1::CompressRequest> AllMessages(const PromptData& data);

}  // namespace structkv::testkit
