#include "tests/testing/rotation.h"

#include <cmath>
#include <cstdlib>

#include "tests/testing/numbers.h"

namespace structkv::testkit {
namespace {

// Radians per token of pair `j`, in a sequence of `tokens`.
double Frequency(const v1::RotaryParameters& rotary, double dim, double j, double tokens) {
  double theta = rotary.rope_theta();
  double divisor = 1;
  switch (rotary.rope_type()) {
    case v1::ROPE_TYPE_UNSPECIFIED:
    case v1::ROPE_TYPE_DEFAULT:
      break;
    case v1::ROPE_TYPE_LINEAR:
      divisor = rotary.factor();
      break;
    case v1::ROPE_TYPE_DYNAMIC:
      if (tokens > rotary.max_position_embeddings()) {
        const double stretch = rotary.factor() * tokens / rotary.max_position_embeddings();
        theta *= std::pow(stretch - (rotary.factor() - 1), dim / (dim - 2));
      }
      break;
    default:
      std::abort();  // a test's own mistake
  }
  return std::pow(theta, -2 * j / dim) / divisor;
}

// Half a unit in the last place, relative.
double Unit(v1::DType dtype) {
  return std::ldexp(1.0, dtype == v1::DTYPE_F32 ? -24 : dtype == v1::DTYPE_F16 ? -11 : -8);
}

}  // namespace

bool IsTurned(const v1::Open& open, const TurnedKey& key) {
  const v1::RotaryParameters& rotary = open.rotary();
  const size_t key_dim = open.geometry().key_dim();
  const size_t offset = rotary.rotary_offset();
  const size_t dim = rotary.has_rotary_dim() ? rotary.rotary_dim() : key_dim - offset;
  const bool interleaved = rotary.pairing() == v1::ROTARY_PAIRING_INTERLEAVED;
  const auto before = [&](size_t e) { return ElementAt(open.dtype(), key.source, key.from + e); };
  const auto after = [&](size_t e) { return ElementAt(open.dtype(), key.got, key.to + e); };
  for (size_t e = 0; e < key_dim; ++e) {
    if ((e < offset || e >= offset + dim) && before(e) != after(e)) return false;
  }
  for (size_t j = 0; j < dim / 2; ++j) {
    const size_t first = offset + (interleaved ? 2 * j : j);
    const size_t second = interleaved ? first + 1 : first + dim / 2;
    const auto at = static_cast<double>(j);
    const double angle =
        key.new_position * Frequency(rotary, static_cast<double>(dim), at, key.kv_length) -
        key.position * Frequency(rotary, static_cast<double>(dim), at, open.prompt_tokens());
    const double x = before(first);
    const double y = before(second);
    // Angles are of float32's precision.
    const double bound =
        std::hypot(x, y) * (Unit(open.dtype()) + std::ldexp(key.position + 8.0, -22));
    if (!(std::fabs(after(first) - (x * std::cos(angle) - y * std::sin(angle))) <= bound) ||
        !(std::fabs(after(second) - (y * std::cos(angle) + x * std::sin(angle))) <= bound)) {
      return false;
    }
  }
  return true;
}

}  // namespace structkv::testkit
