#include "client/cli/overlap.h"

#include <algorithm>
#include <iterator>

namespace structkv::cli {

KeptSets KeptSetsOf(const client::Compressed& compressed, uint32_t kv_heads) {
  const bool one_for_all =
      compressed.opened.method().has_gemfilter() && compressed.pivot.has_value();
  KeptSets sets;
  for (const client::LayerResult& layer : compressed.layers) {
    std::vector<std::vector<int32_t>>& heads = sets.emplace_back();
    for (uint32_t head = 0; head < kv_heads; ++head) {
      if (one_for_all) {
        heads.push_back(compressed.pivot->skeleton);
        continue;
      }
      const absl::Span<const int32_t> positions = layer.position_values();
      const bool per_head = positions.size() > layer.kept_tokens;
      const absl::Span<const int32_t> row =
          positions.subspan(per_head ? size_t{head} * layer.kept_tokens : 0, layer.kept_tokens);
      heads.emplace_back(row.begin(), row.end());
    }
  }
  return sets;
}

double Overlap(const KeptSets& base, const KeptSets& other) {
  size_t tokens = 0;
  std::vector<int32_t> both;
  for (size_t layer = 0; layer < std::min(base.size(), other.size()); ++layer) {
    for (size_t head = 0; head < base[layer].size(); ++head) {
      tokens += base[layer][head].size();
      std::set_intersection(base[layer][head].begin(), base[layer][head].end(),
                            other[layer][head].begin(), other[layer][head].end(),
                            std::back_inserter(both));
    }
  }
  return tokens == 0 ? 0 : static_cast<double>(both.size()) / static_cast<double>(tokens);
}

}  // namespace structkv::cli
