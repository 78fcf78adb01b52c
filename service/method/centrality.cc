#include "service/method/centrality.h"

#include <algorithm>
#include <utility>

namespace structkv::method {

Centrality::Centrality(double decay, int64_t first, int64_t last,
                       std::unique_ptr<ResidentVectors> vectors)
    : decay_(static_cast<float>(decay)), first_(first), last_(last), vectors_(std::move(vectors)) {
  for (int64_t vector = MaxVectors(last); vector > 0; --vector) free_.push_back(vector - 1);
}

std::optional<ResidentPlace> Centrality::PlaceOf(int64_t layer) const {
  if (layer > last_) return std::nullopt;
  if (GoesToSum(layer)) return ResidentPlace{*sum_, decay_};
  return ResidentPlace{free_.back(), std::nullopt};
}

absl::Status Centrality::Came(int64_t layer, ParallelFor parallel) {
  if (layer > last_) return absl::OkStatus();
  if (GoesToSum(layer)) {
    ++next_;
  } else {
    wait_.emplace(layer, free_.back());
    free_.pop_back();
  }
  return FoldUpTo(first_, parallel);
}

absl::Status Centrality::Add(int64_t layer, absl::Span<const float> saliency,
                             ParallelFor parallel) {
  const std::optional<ResidentPlace> place = PlaceOf(layer);
  if (!place.has_value()) return absl::OkStatus();
  absl::Status status = vectors_->Add(*place, saliency.data(), parallel);
  return status.ok() ? Came(layer, parallel) : status;
}

absl::Status Centrality::NotBelow(int64_t layer, ParallelFor parallel) {
  first_ = std::max(first_, std::min(layer, last_));
  return FoldUpTo(first_, parallel);
}

absl::Status Centrality::Finish(int64_t layer, ParallelFor parallel) {
  absl::Status status = FoldUpTo(layer, parallel);
  for (const auto& [waiting, vector] : wait_) Free(vector);
  wait_.clear();
  return status;
}

absl::Status Centrality::Select(const SelectParams& params, int32_t* positions) const {
  return vectors_->Select(*sum_, params, positions);
}

absl::Status Centrality::Read(float* values) const { return vectors_->Read(*sum_, values); }

int64_t Centrality::vectors() const {
  return static_cast<int64_t>(wait_.size()) + (sum_.has_value() ? 1 : 0);
}

absl::Status Centrality::FoldUpTo(int64_t layer, ParallelFor parallel) {
  std::vector<int64_t> folded;
  for (; next_ <= layer && !wait_.empty() && wait_.begin()->first == next_; ++next_) {
    const int64_t vector = wait_.begin()->second;
    wait_.erase(wait_.begin());
    if (sum_.has_value()) {
      folded.push_back(vector);
    } else {
      sum_ = vector;
    }
  }
  if (folded.empty()) return absl::OkStatus();
  absl::Status status = vectors_->Fold(*sum_, decay_, folded, parallel);
  for (const int64_t vector : folded) Free(vector);
  return status;
}

void Centrality::Free(int64_t vector) {
  vectors_->Drop(vector);
  free_.push_back(vector);
}

}  // namespace structkv::method
