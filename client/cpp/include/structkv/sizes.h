// Sizes of tensors, as they follow from `Open` and `Opened`.
#pragma once

#include <cstdint>

#include "structkv/v1/compression.pb.h"

namespace structkv::client {

// Bytes of one element; 0 for an unknown type.
uint64_t ElementBytes(v1::DType dtype);

// The element type of window queries: `Open.query_dtype` or its default.
v1::DType QueryDType(const v1::Open& open);

// KV and query heads that this stream carries: the model's, or of a shard group its rank's.
uint32_t KvHeads(const v1::Open& open);
uint32_t QueryHeads(const v1::Open& open);

// The granularity of a method with every parameter in force, as `Opened` has it: PER_LAYER where
// the method has none.
v1::Granularity EffectiveGranularity(const v1::Method& method);

// The most tokens that a layer of `open` may keep, before `Opened` says how many it does.
uint32_t MostKeptTokens(const v1::Open& open);

// Bytes that its results take of PromptOptions.results, at most.
uint64_t MostResultBytes(const v1::Open& open);

// Blocks of keys that a layer of `kept` tokens comes back in, or is held in; 0 where they are not
// paged, or of a plan.
uint32_t KeptBlocks(const v1::Open& open, uint32_t kept);

// Bytes of one layer's tensor on the way to the server, for a layer that keeps tokens (the others
// send nothing); 0 where this prompt has no such tensor.
uint64_t InputTensorBytes(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor);

// The same of a layer of skeleton rows, which has TENSOR_POSITIONS too.
uint64_t SkeletonTensorBytes(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor);

// Bytes of one full layer's tensor on the way back; 0 where this prompt has no such tensor, or the
// layer does not exist.
uint64_t OutputTensorBytes(const v1::Open& open, const v1::Opened& opened, uint32_t layer,
                           v1::Tensor tensor);

// The same of a layer that has `tokens` and keeps `kept` of them.
uint64_t AnswerTensorBytes(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor,
                           uint32_t tokens, uint32_t kept);

}  // namespace structkv::client
