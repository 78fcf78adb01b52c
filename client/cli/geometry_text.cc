#include "client/cli/geometry_text.h"

#include <cstdint>

#include "absl/strings/str_cat.h"
#include "client/cli/text.h"

namespace structkv::cli {

std::string HeadsText(const v1::ModelGeometry& geometry) {
  const uint32_t keys = geometry.key_dim();
  const uint32_t values = geometry.value_dim() == 0 ? keys : geometry.value_dim();
  std::string text =
      absl::StrCat(CountText(geometry.query_head_count()), " query and ",
                   CountText(geometry.kv_head_count()), " KV heads of ", CountText(keys));
  if (geometry.values_in_keys()) {
    absl::StrAppend(&text, ", values in the first ", CountText(values));
  } else if (values != keys) {
    absl::StrAppend(&text, ", values of ", CountText(values));
  }
  return text;
}

}  // namespace structkv::cli
