#include "service/rpc/rotary_codec.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "service/rpc/method_codec.h"

namespace structkv::rpc {
namespace {

using method::RopeType;
using method::RotarySpec;

absl::Status Invalid(absl::string_view field, absl::string_view value, absl::string_view allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat("open.rotary.", field, " is ", value, "; ", allowed));
}

absl::Status DecodeEnums(const v1::RotaryParameters& rotary, RotarySpec* spec) {
  switch (rotary.rope_type()) {
    case v1::ROPE_TYPE_UNSPECIFIED:
    case v1::ROPE_TYPE_DEFAULT:
      spec->type = RopeType::kDefault;
      break;
    case v1::ROPE_TYPE_LINEAR:
      spec->type = RopeType::kLinear;
      break;
    case v1::ROPE_TYPE_DYNAMIC:
      spec->type = RopeType::kDynamic;
      break;
    case v1::ROPE_TYPE_YARN:
      spec->type = RopeType::kYarn;
      break;
    case v1::ROPE_TYPE_LLAMA3:
      spec->type = RopeType::kLlama3;
      break;
    default:
      return Invalid("rope_type", EnumText(rotary.rope_type()),
                     "allowed: ROPE_TYPE_DEFAULT, ROPE_TYPE_LINEAR, ROPE_TYPE_DYNAMIC, "
                     "ROPE_TYPE_YARN, ROPE_TYPE_LLAMA3");
  }
  switch (rotary.pairing()) {
    case v1::ROTARY_PAIRING_UNSPECIFIED:
    case v1::ROTARY_PAIRING_HALF_SPLIT:
      spec->pairing = RotaryPairing::kHalfSplit;
      return absl::OkStatus();
    case v1::ROTARY_PAIRING_INTERLEAVED:
      spec->pairing = RotaryPairing::kInterleaved;
      return absl::OkStatus();
    default:
      return Invalid("pairing", EnumText(rotary.pairing()),
                     "allowed: ROTARY_PAIRING_HALF_SPLIT, ROTARY_PAIRING_INTERLEAVED");
  }
}

v1::RopeType EncodeType(RopeType type) {
  switch (type) {
    case RopeType::kDefault:
      return v1::ROPE_TYPE_DEFAULT;
    case RopeType::kLinear:
      return v1::ROPE_TYPE_LINEAR;
    case RopeType::kDynamic:
      return v1::ROPE_TYPE_DYNAMIC;
    case RopeType::kYarn:
      return v1::ROPE_TYPE_YARN;
    case RopeType::kLlama3:
      return v1::ROPE_TYPE_LLAMA3;
  }
  return v1::ROPE_TYPE_UNSPECIFIED;
}

enum class Need : uint8_t { kNone, kOptional, kRequired };

// Takes one parameter, where the type has it.
template <typename Proto, typename Value>
absl::Status Take(v1::RopeType type, absl::string_view field, bool is_set, Proto value, Need need,
                  Value* out) {
  if (need == Need::kNone && is_set) {
    return Invalid(field, absl::StrCat(value),
                   absl::StrCat(EnumText(type), " has no such parameter"));
  }
  if (need == Need::kRequired && !is_set) {
    return Invalid(field, "not set", absl::StrCat(EnumText(type), " needs it"));
  }
  if (is_set) *out = static_cast<Value>(value);
  return absl::OkStatus();
}

absl::Status DecodeScaling(const v1::RotaryParameters& r, RotarySpec* spec) {
  const v1::RopeType type = EncodeType(spec->type);
  const bool dynamic = spec->type == RopeType::kDynamic;
  const bool yarn = spec->type == RopeType::kYarn;
  const bool llama3 = spec->type == RopeType::kLlama3;
  const auto required = [](bool has) { return has ? Need::kRequired : Need::kNone; };
  const Need ramp = yarn ? Need::kOptional : Need::kNone;
  absl::Status status = Take(type, "factor", r.has_factor(), r.factor(),
                             required(spec->type != RopeType::kDefault), &spec->factor);
  status.Update(Take(type, "original_max_position_embeddings",
                     r.has_original_max_position_embeddings(), r.original_max_position_embeddings(),
                     required(yarn || llama3), &spec->original_max_position_embeddings));
  status.Update(Take(type, "max_position_embeddings", r.has_max_position_embeddings(),
                     r.max_position_embeddings(), required(dynamic),
                     &spec->max_position_embeddings));
  status.Update(Take(type, "beta_fast", r.has_beta_fast(), r.beta_fast(), ramp, &spec->beta_fast));
  status.Update(Take(type, "beta_slow", r.has_beta_slow(), r.beta_slow(), ramp, &spec->beta_slow));
  status.Update(Take(type, "truncate", r.has_truncate(), r.truncate(), ramp, &spec->truncate));
  status.Update(Take(type, "low_freq_factor", r.has_low_freq_factor(), r.low_freq_factor(),
                     required(llama3), &spec->low_freq_factor));
  status.Update(Take(type, "high_freq_factor", r.has_high_freq_factor(), r.high_freq_factor(),
                     required(llama3), &spec->high_freq_factor));
  return status;
}

}  // namespace

absl::StatusOr<RotarySpec> DecodeRotary(const v1::RotaryParameters& rotary, int64_t key_dim) {
  RotarySpec spec;
  if (!rotary.has_rope_theta()) return Invalid("rope_theta", "not set", "it is required");
  spec.theta = rotary.rope_theta();
  absl::Status status = DecodeEnums(rotary, &spec);
  if (status.ok()) status = DecodeScaling(rotary, &spec);
  if (!status.ok()) return status;
  spec.offset = rotary.rotary_offset();
  spec.dim = rotary.has_rotary_dim() ? rotary.rotary_dim() : key_dim - spec.offset;
  return spec;
}

v1::RotaryParameters EncodeRotary(const RotarySpec& spec) {
  v1::RotaryParameters rotary;
  rotary.set_rope_theta(spec.theta);
  rotary.set_rope_type(EncodeType(spec.type));
  if (spec.type != RopeType::kDefault) rotary.set_factor(spec.factor);
  if (spec.type == RopeType::kYarn || spec.type == RopeType::kLlama3) {
    rotary.set_original_max_position_embeddings(
        static_cast<uint32_t>(spec.original_max_position_embeddings));
  }
  if (spec.type == RopeType::kDynamic) {
    rotary.set_max_position_embeddings(static_cast<uint32_t>(spec.max_position_embeddings));
  }
  if (spec.type == RopeType::kYarn) {
    rotary.set_beta_fast(spec.beta_fast);
    rotary.set_beta_slow(spec.beta_slow);
    rotary.set_truncate(spec.truncate);
  }
  if (spec.type == RopeType::kLlama3) {
    rotary.set_low_freq_factor(spec.low_freq_factor);
    rotary.set_high_freq_factor(spec.high_freq_factor);
  }
  rotary.set_pairing(spec.pairing == RotaryPairing::kInterleaved ? v1::ROTARY_PAIRING_INTERLEAVED
                                                                 : v1::ROTARY_PAIRING_HALF_SPLIT);
  rotary.set_rotary_dim(static_cast<uint32_t>(spec.dim));
  rotary.set_rotary_offset(static_cast<uint32_t>(spec.offset));
  return rotary;
}

}  // namespace structkv::rpc
