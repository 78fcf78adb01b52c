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
// to the first that can be asked for, as far as they came in order, and one per other layer up to
// the last that can be asked for. Not thread-safe.
class Centrality {
 public:
  // C can be asked for at the layers first .. last, 0 <= first <= last; `backend` outlives the
  // object.
  Centrality(double decay, int64_t tokens, int64_t first, int64_t last, const Backend* backend);

  // Copies the saliency of `layer`, [tokens]; layers past `last` are ignored. Each layer once.
  void Add(int64_t layer, absl::Span<const float> saliency, ParallelFor parallel);

  // C will not be asked for below `layer`, <= last: layers up to it need no vectors of their own.
  void NotBelow(int64_t layer, ParallelFor parallel);

  // C(layer), [tokens], and drops everything held. Layers 0 .. layer were added; `layer` lies in
  // [first, last], and not below NotBelow().
  std::vector<float> Take(int64_t layer, ParallelFor parallel);

  // Vectors of [tokens] float32 that are held at most.
  static int64_t MaxVectors(int64_t last) { return last + 1; }

  // Vectors held now.
  int64_t vectors() const;

 private:
  // Adds waiting layers to the sum, in order, up to `layer`.
  void FoldUpTo(int64_t layer, ParallelFor parallel);

  float decay_;
  int64_t tokens_;
  int64_t first_;
  int64_t last_;
  const Backend* backend_;
  int64_t next_ = 0;                            // first layer that is not in sum_
  std::vector<float> sum_;                      // C(next_ - 1); empty before layer 0
  std::map<int64_t, std::vector<float>> wait_;  // layers that came and are not in sum_
};

}  // namespace structkv::method
