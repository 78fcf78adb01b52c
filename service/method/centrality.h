// Global in-degree centrality, C(l) = lambda C(l - 1) + S(l) (docs/method.md, section 2).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/resident_vectors.h"

namespace structkv::method {

// Takes the layers' saliency in any order and gives the centrality at a layer, always accumulated
// in layer order, so that the order of arrival leaves no trace. Holds one vector of all layers up
// to the first that can be asked for, as far as they came in order, and one per other layer up to
// the last that can be asked for. Not thread-safe. Errors are the vectors'; after one the object is
// good for nothing.
class Centrality {
 public:
  // C can be asked for at the layers first .. last, 0 <= first <= last. `vectors`: MaxVectors(last)
  // of the prompt's tokens.
  Centrality(double decay, int64_t first, int64_t last, std::unique_ptr<ResidentVectors> vectors);

  // Where the saliency of a layer that did not come yet goes; none: it is past `last`, and does not
  // count.
  std::optional<ResidentPlace> PlaceOf(int64_t layer) const;
  // What PlaceOf(layer) says was done since the last layer came, by whatever computes the saliency.
  absl::Status Came(int64_t layer, ParallelFor parallel);
  // Does it, and that: `saliency` is [tokens], the host's.
  absl::Status Add(int64_t layer, absl::Span<const float> saliency, ParallelFor parallel);

  // C will not be asked for below `layer`, <= last: layers up to it need no vectors of their own.
  absl::Status NotBelow(int64_t layer, ParallelFor parallel);

  // Goes on to C(layer) and drops all other vectors; nothing is added any more. Layers 0 .. layer
  // were added; `layer` lies in [first, last], and not below NotBelow().
  absl::Status Finish(int64_t layer, ParallelFor parallel);
  // Of C, once finished: as Backend::Select, of params without scores; and as it is, [tokens].
  absl::Status Select(const SelectParams& params, int32_t* positions) const;
  absl::Status Read(float* values) const;

  // Vectors of [tokens] float32 that are held at most.
  static int64_t MaxVectors(int64_t last) { return last + 1; }

  // Vectors held now.
  int64_t vectors() const;
  // Those that PlaceOf speaks of.
  ResidentVectors* resident() const { return vectors_.get(); }

 private:
  bool GoesToSum(int64_t layer) const {
    return sum_.has_value() && layer == next_ && layer <= first_;
  }
  // Adds waiting layers to the sum, in order, up to `layer`.
  absl::Status FoldUpTo(int64_t layer, ParallelFor parallel);
  void Free(int64_t vector);

  float decay_;
  int64_t first_;
  int64_t last_;
  const std::unique_ptr<ResidentVectors> vectors_;
  std::vector<int64_t> free_;        // vectors that hold nothing
  int64_t next_ = 0;                 // first layer that is not in the sum
  std::optional<int64_t> sum_;       // the vector of C(next_ - 1); none before layer 0
  std::map<int64_t, int64_t> wait_;  // layers that came and are not in the sum -> their vectors
};

}  // namespace structkv::method
