#include "client/cli/kept.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "client/cli/text.h"

namespace structkv::cli {

Kept KeptOf(const v1::Opened& opened) {
  Kept kept;
  if (opened.kept_tokens().empty()) return kept;
  const auto [least, most] =
      std::minmax_element(opened.kept_tokens().begin(), opened.kept_tokens().end());
  kept.most = *most;
  if (opened.method().has_gemfilter()) {
    kept.least = *most;
    kept.total = uint64_t{*most} * static_cast<uint64_t>(opened.kept_tokens_size());
    return kept;
  }
  kept.least = *least;
  for (uint32_t layer : opened.kept_tokens()) kept.total += layer;
  return kept;
}

std::string KeptText(uint32_t least, uint32_t most) {
  return least == most ? CountText(most) : absl::StrCat(CountText(least), " to ", CountText(most));
}

}  // namespace structkv::cli
