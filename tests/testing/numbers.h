// Deterministic numbers, and the element types that test tensors are made of.
#pragma once

#include <cstdint>
#include <string>

#include "structkv/v1/compression.pb.h"

namespace structkv::testkit {

// SplitMix64: the same numbers everywhere, from any seed.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next();
  // Uniform in [low, high].
  int64_t Between(int64_t low, int64_t high);
  // True `percent` times in 100.
  bool Chance(int percent) { return Between(0, 99) < percent; }

 private:
  uint64_t state_;
};

// Bytes of one element.
size_t ElementBytes(v1::DType dtype);

// Appends `value` to `out`. Exact for the values that tests use: at most 8 significant bits and an
// exponent that binary16 has; of fp8, the nearest value that it has.
void AppendElement(v1::DType dtype, float value, std::string* out);

// Element `index` of `data`.
double ElementAt(v1::DType dtype, const std::string& data, size_t index);

// Overwrites element `index` of `data`; NaN and infinities included.
void SetElement(v1::DType dtype, float value, size_t index, std::string* data);

}  // namespace structkv::testkit
