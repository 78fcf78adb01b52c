#include "client/cpp/result_places.h"

#include <algorithm>

#include "structkv/arena.h"
#include "structkv/sizes.h"

namespace structkv::client {
namespace internal {
namespace {

// Of a tensor of `kept` tokens.
uint64_t Room(const v1::Open& open, v1::Tensor tensor, uint32_t kept) {
  const uint64_t bytes = AnswerTensorBytes(open, {}, tensor, open.prompt_tokens(), kept);
  return (bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
}

uint64_t Stride(const v1::Open& open, uint32_t kept) {
  return Room(open, v1::TENSOR_KEYS, kept) + Room(open, v1::TENSOR_VALUES, kept);
}

uint32_t LargestKept(const v1::Opened& opened) {
  const auto& kept = opened.kept_tokens();
  return kept.empty() ? 0 : *std::max_element(kept.begin(), kept.end());
}

}  // namespace

uint64_t ResultOffset(const v1::Open& open, const v1::Opened& opened, uint32_t layer,
                      v1::Tensor tensor) {
  const uint32_t largest = LargestKept(opened);
  const uint64_t keys = tensor == v1::TENSOR_VALUES ? Room(open, v1::TENSOR_KEYS, largest) : 0;
  return layer * Stride(open, largest) + keys;
}

uint64_t ResultBytes(const v1::Open& open, const v1::Opened& opened, uint32_t layers) {
  return layers * Stride(open, LargestKept(opened));
}

}  // namespace internal

uint64_t MostResultBytes(const v1::Open& open) {
  return open.geometry().layer_count() * internal::Stride(open, MostKeptTokens(open));
}

}  // namespace structkv::client
