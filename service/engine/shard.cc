#include "service/engine/shard.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace structkv::engine {
namespace {

constexpr size_t kMaxGroupIdBytes = 128;

template <typename... Args>
absl::Status Invalid(absl::string_view field, const Args&... text) {
  return absl::InvalidArgumentError(absl::StrCat("open.shard_group.", field, text...));
}

std::string Name(const HeadRange& range) {
  return absl::StrCat("[", range.begin, ", ", range.end(), ")");
}

bool Overlap(const HeadRange& one, const HeadRange& other) {
  return one.begin < other.end() && other.begin < one.end();
}

absl::Status CheckRange(absl::string_view field, const HeadRange& range, int64_t heads) {
  if (range.count > 0 && range.begin >= 0 && range.begin <= heads - range.count) {
    return absl::OkStatus();
  }
  return Invalid(field, " are ", Name(range), "; a run of 1 or more of the model's ", heads,
                 " is allowed");
}

}  // namespace

absl::StatusOr<Shard> EvenShard(const ModelGeometry& geometry, int64_t shard_count,
                                int64_t shard_index) {
  const auto divides = [](int64_t part, int64_t whole) { return part > 0 && whole % part == 0; };
  const bool shared = shard_count > geometry.kv_heads;
  if (!divides(shard_count, geometry.query_heads) ||
      !(shared ? divides(geometry.kv_heads, shard_count)
               : divides(shard_count, geometry.kv_heads))) {
    return Invalid("kv_heads", " and query_heads are not set, and ", shard_count,
                   " shards do not divide ", geometry.query_heads, " query and ", geometry.kv_heads,
                   " KV heads evenly");
  }
  const int64_t queries = geometry.query_heads / shard_count;
  const int64_t keys = std::max<int64_t>(1, geometry.kv_heads / shard_count);
  const int64_t first =
      shared ? shard_index / (shard_count / geometry.kv_heads) : shard_index * keys;
  return Shard{.kv_heads = {first, keys}, .query_heads = {shard_index * queries, queries}};
}

absl::Status ValidateShard(const ShardMember& member, const ModelGeometry& geometry) {
  if (member.group_id.size() > kMaxGroupIdBytes) {
    return Invalid("group_id", " has ", member.group_id.size(), " bytes; at most ",
                   kMaxGroupIdBytes, " are allowed");
  }
  if (member.shard_count < 1 || member.shard_count > geometry.query_heads) {
    return Invalid("shard_count", " is ", member.shard_count, "; 1 to query_head_count (",
                   geometry.query_heads, ") is allowed");
  }
  if (member.group_id.empty() && member.shard_count > 1) {
    return Invalid("group_id", " is empty; a group of ", member.shard_count,
                   " shards needs a name");
  }
  if (member.shard_index < 0 || member.shard_index >= member.shard_count) {
    return Invalid("shard_index", " is ", member.shard_index, "; 0 to shard_count - 1 (",
                   member.shard_count - 1, ") is allowed");
  }
  const HeadRange& kv = member.heads.kv_heads;
  const HeadRange& query = member.heads.query_heads;
  if (absl::Status range = CheckRange("kv_heads", kv, geometry.kv_heads); !range.ok()) return range;
  if (absl::Status range = CheckRange("query_heads", query, geometry.query_heads); !range.ok()) {
    return range;
  }
  const HeadRange group = {kv.begin * geometry.group(), kv.count * geometry.group()};
  const bool within = query.begin >= group.begin && query.end() <= group.end();
  if (within && (query == group || kv.count == 1)) return absl::OkStatus();
  return Invalid("query_heads", " are ", Name(query), ", but KV heads ", Name(kv),
                 " belong to query heads ", Name(group),
                 "; those are allowed, or a part of them with a single KV head");
}

absl::Status CheckApart(const ShardMember& one, const ShardMember& other) {
  const auto names = [&](const HeadRange& a, const HeadRange& b) {
    return absl::StrCat(" of shard ", one.shard_index, " are ", Name(a), " and those of shard ",
                        other.shard_index, " ", Name(b));
  };
  if (Overlap(one.heads.query_heads, other.heads.query_heads)) {
    return Invalid("query_heads", names(one.heads.query_heads, other.heads.query_heads),
                   "; each query head may be in one shard alone");
  }
  if (Overlap(one.heads.kv_heads, other.heads.kv_heads) &&
      !(one.heads.kv_heads == other.heads.kv_heads)) {
    return Invalid("kv_heads", names(one.heads.kv_heads, other.heads.kv_heads),
                   "; shards may share a single KV head alone");
  }
  return absl::OkStatus();
}

absl::Status CheckComplete(const std::vector<ShardMember>& members, const ModelGeometry& geometry) {
  std::vector<HeadRange> ranges;
  ranges.reserve(members.size() + 1);
  for (const ShardMember& member : members) ranges.push_back(member.heads.query_heads);
  ranges.push_back({geometry.query_heads, 0});
  std::sort(ranges.begin(), ranges.end(),
            [](const HeadRange& a, const HeadRange& b) { return a.begin < b.begin; });
  int64_t next = 0;
  for (const HeadRange& range : ranges) {
    if (range.begin > next) {
      return Invalid("query_heads", " ", Name({next, range.begin - next}), " of the model's ",
                     geometry.query_heads, " are in none of the ", members.size(), " shards");
    }
    next = std::max(next, range.end());
  }
  return absl::OkStatus();
}

PromptSpec ShardSpec(const PromptSpec& whole, const Shard& shard) {
  PromptSpec spec = whole;
  spec.geometry.kv_heads = shard.kv_heads.count;
  spec.geometry.query_heads = shard.query_heads.count;
  return spec;
}

int64_t SharedBytes(const PromptSpec& whole, const Backend& backend) {
  const MemoryPlan plan = PlanMemory(whole, backend);
  int64_t bytes = plan.state_bytes + plan.scratch_bytes;
  // The ranks' parts put together: per-head saliency that they gave, queries of a shared KV head.
  if (whole.statistic == Statistic::kSaliencyPerKvHead) {
    bytes += whole.InputBytes(InputTensor::kSaliency);
  }
  bytes += whole.InputBytes(InputTensor::kWindowQueries);
  bytes += whole.InputBytes(InputTensor::kWindowLse);
  return bytes;
}

std::vector<HeadRange> DecodeRuns(const PromptSpec& whole, const HeadRange& kv_heads) {
  const int64_t runs = std::min(whole.decode_shards, whole.geometry.kv_heads);
  if (runs <= 1 || (whole.layout == Layout::kHeadTokenDim && !whole.paged.has_value()))
    return {{0, kv_heads.count}};
  const int64_t each = whole.geometry.kv_heads / runs;
  std::vector<HeadRange> result;
  for (int64_t head = kv_heads.begin; head < kv_heads.end();) {
    const int64_t end = std::min(kv_heads.end(), (head / each + 1) * each);
    result.push_back({head - kv_heads.begin, end - head});
    head = end;
  }
  return result;
}

}  // namespace structkv::engine
