#include "kernels/layer_pass.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace structkv {

absl::Status Backend::RunLayer(const LayerPass& /*pass*/, BadStatistic* /*bad*/,
                               ParallelFor /*parallel*/) const {
  return absl::UnimplementedError(
      absl::StrCat("the backend ", std::string(name()), " takes layers step by step"));
}

}  // namespace structkv
