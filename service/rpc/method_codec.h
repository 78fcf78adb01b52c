// `Method` and its parameters: the proto's optional fields and the engine's spec with every
// parameter in force. Part of the open decoder.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/generated_enum_reflection.h"
#include "service/method/method_spec.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::rpc {

// "DTYPE_F32 (1)", or the bare number of a value that this build does not know.
template <typename Enum>
std::string EnumText(Enum value) {
  const auto* known = google::protobuf::GetEnumDescriptor<Enum>()->FindValueByNumber(value);
  const int number = value;
  return known == nullptr ? absl::StrCat(number) : absl::StrCat(known->name(), " (", number, ")");
}

// Fills unset parameters with the method's defaults. INVALID_ARGUMENT for unknown enum values and
// parameters that contradict each other; ranges are engine::ValidateSpec's, save those that the
// number's type would hide. `layers` is the model's; `statistic` is
// the one asked for, which a default may depend on.
absl::StatusOr<method::MethodSpec> DecodeMethod(const v1::Method& method, int64_t layers,
                                                v1::Statistic statistic);

v1::PivotMode EncodePivotMode(method::PivotMode mode);

}  // namespace structkv::rpc
