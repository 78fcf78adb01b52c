#include "service/method/centrality.h"

#include <algorithm>
#include <utility>

namespace structkv::method {

Centrality::Centrality(double decay, int64_t tokens, int64_t first, int64_t last,
                       const Backend* backend)
    : decay_(static_cast<float>(decay)),
      tokens_(tokens),
      first_(first),
      last_(last),
      backend_(backend) {}

void Centrality::Add(int64_t layer, absl::Span<const float> saliency, ParallelFor parallel) {
  if (layer > last_) return;
  if (layer == next_ && layer > 0 && layer <= first_) {
    backend_->Accumulate(decay_, saliency.data(), sum_.data(), tokens_, parallel);
    ++next_;
  } else {
    wait_.emplace(layer, std::vector<float>(saliency.begin(), saliency.end()));
  }
  FoldUpTo(first_, parallel);
}

void Centrality::NotBelow(int64_t layer, ParallelFor parallel) {
  first_ = std::max(first_, std::min(layer, last_));
  FoldUpTo(first_, parallel);
}

std::vector<float> Centrality::Take(int64_t layer, ParallelFor parallel) {
  FoldUpTo(layer, parallel);
  wait_.clear();
  return std::move(sum_);
}

int64_t Centrality::vectors() const {
  return static_cast<int64_t>(wait_.size()) + (sum_.empty() ? 0 : 1);
}

void Centrality::FoldUpTo(int64_t layer, ParallelFor parallel) {
  while (next_ <= layer && !wait_.empty() && wait_.begin()->first == next_) {
    auto first = wait_.begin();
    if (next_ == 0) {
      sum_ = std::move(first->second);
    } else {
      backend_->Accumulate(decay_, first->second.data(), sum_.data(), tokens_, parallel);
    }
    wait_.erase(first);
    ++next_;
  }
}

}  // namespace structkv::method
