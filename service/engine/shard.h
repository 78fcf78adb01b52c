// The part of a prompt that one rank of a tensor-parallel group holds: some of the model's heads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "service/engine/prompt_spec.h"

namespace structkv::engine {

// Heads begin .. begin + count - 1 of the model.
struct HeadRange {
  int64_t begin = 0;
  int64_t count = 0;

  int64_t end() const { return begin + count; }
  friend bool operator==(const HeadRange&, const HeadRange&) = default;
};

// The heads of one rank. Its query heads are those of its KV heads' groups, or, where several ranks
// hold the same single KV head, a part of that group.
struct Shard {
  HeadRange kv_heads;
  HeadRange query_heads;
};

// A rank among its group.
struct ShardMember {
  std::string group_id;
  int64_t shard_count = 1;
  int64_t shard_index = 0;
  Shard heads;
};

// The even division of the model's heads, shard_index < shard_count; ranks beyond the KV heads
// share one. INVALID_ARGUMENT where the numbers do not divide each other.
absl::StatusOr<Shard> EvenShard(const ModelGeometry& geometry, int64_t shard_count,
                                int64_t shard_index);

// INVALID_ARGUMENT, naming the field as the proto does, the value and the limit.
absl::Status ValidateShard(const ShardMember& member, const ModelGeometry& geometry);

// INVALID_ARGUMENT where two ranks hold a query head both, or overlapping but different KV heads.
absl::Status CheckApart(const ShardMember& one, const ShardMember& other);

// INVALID_ARGUMENT, naming the query heads, where none of the ranks has them. Each two are apart.
absl::Status CheckComplete(const std::vector<ShardMember>& members, const ModelGeometry& geometry);

// `whole` with the shard's heads alone: the sizes of its own tensors.
PromptSpec ShardSpec(const PromptSpec& whole, const Shard& shard);

// Bytes that a group takes beside each rank's tensors and answers: what the prompt keeps from layer
// to layer, and scratch.
int64_t SharedBytes(const PromptSpec& whole, const Backend& backend);

// The runs of a shard's KV heads that its kept rows are arranged in, one after the other, relative
// to its first: one for each of PromptSpec::decode_shards that gets heads of it. One run of all
// where the layout keeps each head's rows together anyway, as [kv_head, token, dim] without blocks
// does.
std::vector<HeadRange> DecodeRuns(const PromptSpec& whole, const HeadRange& kv_heads);

}  // namespace structkv::engine
