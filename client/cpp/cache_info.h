// What a server says of a held cache, before any memory is taken for it.
#pragma once

#include "absl/status/status.h"
#include "structkv/held_cache.h"
#include "structkv/v1/held_cache.pb.h"

namespace structkv::client::internal {

// Whether `info` is what `options` asked for and agrees with itself: then the sizes that follow
// from it (sizes.h, of OpenOf() and OpenedOf()) do not overflow, are those that it gives, and are
// within `FetchOptions.max_bytes`.
//   DATA_LOSS           what is not; the field, its value and what is allowed are named
//   RESOURCE_EXHAUSTED  more than max_bytes
absl::Status CheckCacheInfo(const v1::CacheInfo& info, const FetchOptions& options);

}  // namespace structkv::client::internal
