// Global in-degree centrality, C(l) = lambda C(l - 1) + S(l) (docs/method.md, section 2).
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "absl/types/span.h"
#include "kernels/backend.h"

namespace structkv::method {

// Takes the layers' saliency in any order and gives the centrality at a layer, always accumulated
// in layer order, so that the order of arrival leaves no trace. Holds one vector of all layers up
// to the first possible pivot that came in order, and one per other layer up to the last possible
// pivot. Not thread-safe.
class Centrality {
 public:
  // 0 <= first_pivot <= last_pivot; `backend` outlives the object.
  Centrality(double decay, int64_t tokens, int64_t first_pivot, int64_t last_pivot,
             const Backend* backend);

  // Copies the saliency of `layer`, [tokens]; layers past the last possible pivot are ignored. Each
  // layer once.
  void Add(int64_t layer, absl::Span<const float> saliency, ParallelFor parallel);

  // C(pivot), [tokens], and drops everything held. Layers 0 .. pivot were added; pivot lies in
  // [first_pivot, last_pivot].
  std::vector<float> Take(int64_t pivot, ParallelFor parallel);

  // Vectors of [tokens] float32 that are held at most.
  static int64_t MaxVectors(int64_t last_pivot) { return last_pivot + 1; }

  // Vectors held now.
  int64_t vectors() const;

 private:
  // Adds waiting layers to the sum, in order, up to `layer`.
  void FoldUpTo(int64_t layer, ParallelFor parallel);

  float decay_;
  int64_t tokens_;
  int64_t first_pivot_;
  int64_t last_pivot_;
  const Backend* backend_;
  int64_t next_ = 0;                            // first layer that is not in sum_
  std::vector<float> sum_;                      // C(next_ - 1); empty before layer 0
  std::map<int64_t, std::vector<float>> wait_;  // layers that came and are not in sum_
};

}  // namespace structkv::method
