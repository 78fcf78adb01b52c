// Errors that come of a NaN or an infinity in what a client sent, so that they can be counted.
#pragma once

#include "absl/status/status.h"
#include "absl/strings/cord.h"

namespace structkv::engine {

inline constexpr char kNonFinitePayload[] = "structkv/nonfinite";

// `status` is not OK.
inline absl::Status MarkNonFinite(absl::Status status) {
  status.SetPayload(kNonFinitePayload, absl::Cord());
  return status;
}

inline bool IsNonFinite(const absl::Status& status) {
  return status.GetPayload(kNonFinitePayload).has_value();
}

}  // namespace structkv::engine
