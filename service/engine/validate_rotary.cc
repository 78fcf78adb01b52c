#include "service/engine/validate_rotary.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace structkv::engine {
namespace {

using method::RopeType;
using method::RotarySpec;

constexpr double kMaxTheta = 1e30;
constexpr double kMaxFactor = 1e6;

template <typename... Args>
absl::Status Invalid(absl::string_view field, const Args&... text) {
  return absl::InvalidArgumentError(absl::StrCat("open.rotary.", field, ": ", text...));
}

absl::Status CheckPositive(absl::string_view field, double value) {
  if (value > 0 && std::isfinite(value)) return absl::OkStatus();
  return Invalid(field, value, " is not a finite number above 0");
}

absl::Status CheckContext(absl::string_view field, int64_t tokens) {
  if (tokens >= 1) return absl::OkStatus();
  return Invalid(field, tokens, " is out of range [1, 4294967295]");
}

absl::Status CheckPart(const RotarySpec& rotary, int64_t key_dim) {
  const int64_t least = rotary.type == RopeType::kDynamic ? 4 : 2;
  if (rotary.offset < 0 || rotary.offset > key_dim - least) {
    return Invalid("rotary_offset", rotary.offset, " is out of range [0, ", key_dim - least,
                   "] with key_dim ", key_dim);
  }
  const int64_t most = key_dim - rotary.offset;
  if (rotary.dim < least || rotary.dim > most) {
    return Invalid("rotary_dim", rotary.dim, " is out of range [", least, ", ", most,
                   "] with rotary_offset ", rotary.offset, " and key_dim ", key_dim);
  }
  if (rotary.dim % 2 != 0) return Invalid("rotary_dim", rotary.dim, " is not even");
  return absl::OkStatus();
}

absl::Status CheckYarn(const RotarySpec& rotary) {
  absl::Status status =
      CheckContext("original_max_position_embeddings", rotary.original_max_position_embeddings);
  status.Update(CheckPositive("beta_fast", rotary.beta_fast));
  status.Update(CheckPositive("beta_slow", rotary.beta_slow));
  if (!status.ok() || rotary.beta_fast >= rotary.beta_slow) return status;
  return Invalid("beta_fast", rotary.beta_fast, " is below beta_slow, ", rotary.beta_slow);
}

absl::Status CheckLlama3(const RotarySpec& rotary) {
  absl::Status status =
      CheckContext("original_max_position_embeddings", rotary.original_max_position_embeddings);
  status.Update(CheckPositive("low_freq_factor", rotary.low_freq_factor));
  status.Update(CheckPositive("high_freq_factor", rotary.high_freq_factor));
  if (!status.ok() || rotary.low_freq_factor < rotary.high_freq_factor) return status;
  return Invalid("low_freq_factor", rotary.low_freq_factor, " is not below high_freq_factor, ",
                 rotary.high_freq_factor);
}

absl::Status CheckScaling(const RotarySpec& rotary) {
  if (rotary.type == RopeType::kDefault) return absl::OkStatus();
  if (!(rotary.factor >= 1 && rotary.factor <= kMaxFactor)) {
    return Invalid("factor", rotary.factor, " is out of range [1, ", kMaxFactor, "]");
  }
  switch (rotary.type) {
    case RopeType::kDynamic:
      return CheckContext("max_position_embeddings", rotary.max_position_embeddings);
    case RopeType::kYarn:
      return CheckYarn(rotary);
    case RopeType::kLlama3:
      return CheckLlama3(rotary);
    case RopeType::kDefault:
    case RopeType::kLinear:
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateRotary(const PromptSpec& spec) {
  if (!spec.rotary.has_value()) return absl::OkStatus();
  if (spec.plan_only) {
    return absl::InvalidArgumentError(
        "open.rotary: is set, but the output is PLAN: there are no keys to turn");
  }
  if (spec.pulls(InputTensor::kKeys)) {
    return absl::InvalidArgumentError(
        "open.rotary: is set, but open.pull is KEYS_AND_VALUES: keys that are pulled are not "
        "turned; it must be NONE or VALUES");
  }
  if (spec.dtype != DType::kF32 && spec.dtype != DType::kF16 && spec.dtype != DType::kBF16) {
    const std::string_view name = DTypeName(spec.dtype);
    return absl::InvalidArgumentError(absl::StrCat(
        "open.rotary: is set, but the dtype is ", absl::string_view(name.data(), name.size()),
        ": 8-bit keys would have to be quantised again; allowed are f32, f16, bf16"));
  }
  const RotarySpec& rotary = *spec.rotary;
  if (!(rotary.theta > 1 && rotary.theta <= kMaxTheta)) {
    return Invalid("rope_theta", rotary.theta, " is out of range (1, ", kMaxTheta, "]");
  }
  absl::Status part = CheckPart(rotary, spec.geometry.key_dim);
  if (part.ok() && spec.geometry.values_in_keys && rotary.offset < spec.geometry.value_dim) {
    return Invalid("rotary_offset", rotary.offset, " is below value_dim, ", spec.geometry.value_dim,
                   ", but with values_in_keys those elements are values, which are not turned");
  }
  return part.ok() ? CheckScaling(rotary) : part;
}

}  // namespace structkv::engine
