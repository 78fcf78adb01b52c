#include "service/method/rotary.h"

#include <algorithm>
#include <cmath>

namespace structkv::method {
namespace {

constexpr double kPi = 3.14159265358979323846;

// base^(2 j / dim), the inverse of the plain frequencies.
std::vector<float> Periods(const RotarySpec& spec, float base) {
  std::vector<float> periods(static_cast<size_t>(spec.pairs()));
  for (int64_t j = 0; j < spec.pairs(); ++j) {
    periods[j] = std::pow(base, static_cast<float>(2 * j) / static_cast<float>(spec.dim));
  }
  return periods;
}

std::vector<float> Plain(const RotarySpec& spec, float base) {
  std::vector<float> frequencies = Periods(spec, base);
  for (float& value : frequencies) value = 1.0F / value;
  return frequencies;
}

// The base grows with a sequence beyond what the model was trained for.
float DynamicBase(const RotarySpec& spec, int64_t sequence_tokens) {
  const auto theta = static_cast<float>(spec.theta);
  if (sequence_tokens <= spec.max_position_embeddings) return theta;
  const float stretched = static_cast<float>(spec.factor) * static_cast<float>(sequence_tokens) /
                              static_cast<float>(spec.max_position_embeddings) -
                          static_cast<float>(spec.factor - 1);
  const double exponent = static_cast<double>(spec.dim) / static_cast<double>(spec.dim - 2);
  return theta * static_cast<float>(std::pow(static_cast<double>(stretched), exponent));
}

// Pairs that turn often within the trained context keep their frequency, those that turn seldom are
// slowed down, with a ramp between.
std::vector<float> Yarn(const RotarySpec& spec) {
  const auto dim = static_cast<double>(spec.dim);
  const auto pair_that_turns = [&](double times) {
    return dim *
           std::log(static_cast<double>(spec.original_max_position_embeddings) /
                    (times * 2 * kPi)) /
           (2 * std::log(spec.theta));
  };
  double low = pair_that_turns(spec.beta_fast);
  double high = pair_that_turns(spec.beta_slow);
  if (spec.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;
  const std::vector<float> periods = Periods(spec, static_cast<float>(spec.theta));
  std::vector<float> frequencies(periods.size());
  for (size_t j = 0; j < periods.size(); ++j) {
    const float ramp = std::clamp(
        (static_cast<float>(j) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0F,
        1.0F);
    const float kept = 1.0F - ramp;
    const float slowed = 1.0F / (static_cast<float>(spec.factor) * periods[j]);
    frequencies[j] = slowed * (1.0F - kept) + 1.0F / periods[j] * kept;
  }
  return frequencies;
}

// Pairs whose turn is longer than part of the trained context are slowed down, with a ramp.
std::vector<float> Llama3(const RotarySpec& spec) {
  const auto context = static_cast<double>(spec.original_max_position_embeddings);
  const auto longest = static_cast<float>(context / spec.low_freq_factor);
  const auto shortest = static_cast<float>(context / spec.high_freq_factor);
  const auto factor = static_cast<float>(spec.factor);
  std::vector<float> frequencies = Plain(spec, static_cast<float>(spec.theta));
  for (float& value : frequencies) {
    const float turn = 1.0F / value * static_cast<float>(2 * kPi);
    if (turn > longest) {
      value = value / factor;
    } else if (!(turn < shortest)) {
      const float smooth =
          (1.0F / turn * static_cast<float>(context) - static_cast<float>(spec.low_freq_factor)) /
          static_cast<float>(spec.high_freq_factor - spec.low_freq_factor);
      value = (1.0F - smooth) * value / factor + smooth * value;
    }
  }
  return frequencies;
}

}  // namespace

std::vector<float> InverseFrequencies(const RotarySpec& spec, int64_t sequence_tokens) {
  switch (spec.type) {
    case RopeType::kDefault:
      break;
    case RopeType::kLinear: {
      std::vector<float> frequencies = Plain(spec, static_cast<float>(spec.theta));
      for (float& value : frequencies) value /= static_cast<float>(spec.factor);
      return frequencies;
    }
    case RopeType::kDynamic:
      return Plain(spec, DynamicBase(spec, sequence_tokens));
    case RopeType::kYarn:
      return Yarn(spec);
    case RopeType::kLlama3:
      return Llama3(spec);
  }
  return Plain(spec, static_cast<float>(spec.theta));
}

}  // namespace structkv::method
