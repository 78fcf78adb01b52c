#include "service/engine/paged_layout.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace structkv::engine {
namespace {

template <typename... Args>
absl::Status Invalid(const char* field, const Args&... text) {
  return absl::InvalidArgumentError(absl::StrCat("open.paged.", field, ": ", text...));
}

absl::Status CheckTable(const std::vector<int32_t>& table, int64_t block_count) {
  // Sorted, the two entries of a block lie side by side; a map of the pool could be larger than the
  // prompt.
  std::vector<std::pair<int32_t, size_t>> sorted(table.size());
  for (size_t i = 0; i < table.size(); ++i) {
    // What the wire's uint32 says, of which the largest are negative here.
    const int64_t block = static_cast<uint32_t>(table[i]);
    if (block >= block_count) {
      return Invalid("block_table", "entry ", i, " is block ", block, "; blocks 0 to ",
                     block_count - 1, " are allowed");
    }
    sorted[i] = {table[i], i};
  }
  std::sort(sorted.begin(), sorted.end());
  const auto twice =
      std::adjacent_find(sorted.begin(), sorted.end(),
                         [](const auto& a, const auto& b) { return a.first == b.first; });
  if (twice == sorted.end()) return absl::OkStatus();
  return Invalid("block_table", "entries ", twice->second, " and ", std::next(twice)->second,
                 " are both block ", twice->first, "; a block may come once");
}

}  // namespace

absl::Status CheckPagedLayout(const PagedLayout& paged, int64_t tokens) {
  if (paged.block_tokens < kBlockTokensStep || paged.block_tokens > kMaxBlockTokens ||
      paged.block_tokens % kBlockTokensStep != 0) {
    return Invalid("block_tokens", paged.block_tokens, " is not allowed; multiples of ",
                   kBlockTokensStep, " in [", kBlockTokensStep, ", ", kMaxBlockTokens, "] are");
  }
  const int64_t needed = paged.Blocks(tokens);
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  if (paged.block_count < needed || paged.block_count > kMaxBlocks) {
    return Invalid("block_count", paged.block_count, " is out of range [", needed, ", ", kMaxBlocks,
                   "] for a prompt of ", tokens, " tokens");
  }
  if (static_cast<int64_t>(paged.block_table->size()) != needed) {
    return Invalid("block_table", paged.block_table->size(), " entries, but ", tokens,
                   " tokens in blocks of ", paged.block_tokens, " need ", needed);
  }
  return CheckTable(*paged.block_table, paged.block_count);
}

}  // namespace structkv::engine
