#include "tests/testing/shards.h"

#include <algorithm>
#include <utility>

namespace structkv::testkit {

v1::ShardGroup EvenShardGroup(const v1::Open& open, uint32_t ranks, uint32_t index,
                              const std::string& id) {
  const uint32_t queries = open.geometry().query_head_count();
  const uint32_t keys = open.geometry().kv_head_count();
  v1::ShardGroup group;
  group.set_group_id(id);
  group.set_shard_count(ranks);
  group.set_shard_index(index);
  group.mutable_kv_heads()->set_begin(index * keys / ranks);
  group.mutable_kv_heads()->set_count(std::max(1U, keys / ranks));
  group.mutable_query_heads()->set_begin(index * queries / ranks);
  group.mutable_query_heads()->set_count(queries / ranks);
  return group;
}

std::vector<PromptData> SplitByRanks(const PromptData& whole, uint32_t ranks,
                                     const std::string& id) {
  const bool one_vector = whole.effective().statistic == v1::STATISTIC_SALIENCY;
  const uint32_t keys = whole.open().geometry().kv_head_count();
  const uint32_t sharers = one_vector ? ranks : std::max(1U, ranks / keys);
  std::vector<PromptData> parts;
  for (uint32_t i = 0; i < ranks; ++i) {
    parts.push_back(whole);
    parts.back().KeepHeads(EvenShardGroup(whole.open(), ranks, i, id), sharers);
  }
  return parts;
}

Answer SliceAnswer(const v1::Open& open, const Answer& whole, const v1::ShardGroup& group) {
  const uint32_t heads = open.geometry().kv_head_count();
  const bool per_head = Effective(open).per_head;
  Answer part = whole;
  part.opened.reset();
  part.summary.reset();
  for (auto& [index, layer] : part.layers) {
    for (auto& [tensor, bytes] : layer.tensors) {
      const bool rows = tensor == v1::TENSOR_KEYS || tensor == v1::TENSOR_VALUES;
      const bool scales = tensor == v1::TENSOR_KEY_SCALES || tensor == v1::TENSOR_VALUE_SCALES;
      if (!rows && !(scales ? open.kv_scales() == v1::KV_SCALES_PER_KV_HEAD : per_head)) continue;
      uint64_t runs = 1;
      if (rows && open.layout() == v1::LAYOUT_TOKEN_HEAD_DIM) {
        runs = OutputRows(open, layer.kept_tokens) / heads;
      } else if (rows && open.has_paged()) {
        runs = layer.kept_blocks;
      }
      bytes = SliceHeads(bytes, runs, heads, group.kv_heads());
    }
  }
  return part;
}

std::string ResultBytesOfLayers(Answer answer) {
  answer.summary.reset();
  return ResultBytes(answer);
}

}  // namespace structkv::testkit
