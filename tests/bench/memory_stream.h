// Streams a synthetic prompt that is larger than the memory of the machine: its tensors exist only
// while they are sent. Any of them can be made again, to check what was answered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::bench {

// Llama-3.1-8B's attention: 32 query heads, 8 KV heads of 128, bf16; StructKV at 10 %.
v1::Open LlamaOpen(uint32_t layers, uint32_t tokens);

// The bytes of every tensor of every layer: cuts of a table, which the layer, the tensor and the
// place choose, so that no layer is like another. Keys, values and queries are normally distributed
// bf16, saliency is exponentially distributed float32. Immutable.
class TensorSource {
 public:
  TensorSource();

  static constexpr uint64_t kPieceBytes = uint64_t{2} << 20;

  // Bytes [index * kPieceBytes, + size) of the tensor; size <= kPieceBytes. They live as long as
  // owner() does.
  absl::Span<const std::byte> Piece(uint32_t layer, v1::Tensor tensor, uint64_t index,
                                    uint64_t size) const;
  std::shared_ptr<const void> owner() const { return tables_; }

  // Bytes [begin, begin + size) of a tensor of `tensor_bytes`. Both are multiples of kPieceBytes,
  // or the range ends with the tensor.
  std::vector<std::byte> Make(uint32_t layer, v1::Tensor tensor, uint64_t begin,
                              uint64_t size) const;

 private:
  struct Tables {
    std::vector<std::byte> elements;
    std::vector<std::byte> saliency;
  };
  std::shared_ptr<const Tables> tables_;
};

struct StreamedPrompt {
  v1::Opened opened;
  v1::Summary summary;
  double seconds = 0;
  uint64_t layer_bytes = 0;    // what is sent for one layer
  uint64_t results_bytes = 0;  // compacted keys and values, and positions, of all layers
  std::map<uint32_t, std::vector<int32_t>> positions;  // of the layers that were asked for
  uint64_t wrong_rows = 0;  // of their keys and values that are not those of the positions
};

// Sends every layer of `open` in pieces of `source`, and drops the results as they arrive, but for
// the positions of the layers in `sampled`. The caller's memory is that of one compacted layer, and
// 100 MB. Fails with the stream's status.
absl::StatusOr<StreamedPrompt> StreamPrompt(const std::string& address, const v1::Open& open,
                                            const TensorSource& source = TensorSource(),
                                            const std::set<uint32_t>& sampled = {});

}  // namespace structkv::bench
