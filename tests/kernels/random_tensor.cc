#include "tests/kernels/random_tensor.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <limits>

#include "tests/kernels/fp8_codes.h"

namespace structkv::testing {
namespace {

uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

uint32_t EncodeBfloat(float value) {
  const uint32_t bits = Bits(value);
  if (std::isnan(value)) return (bits >> 16) | 0x40;
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

uint32_t EncodeHalf(float value) {
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (std::isnan(value)) return sign | 0x7E00;
  if (magnitude >= 65520.0) return sign | 0x7C00;
  if (magnitude < std::ldexp(1.0, -14)) {
    return sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  }
  int exponent = 0;
  const double fraction = std::frexp(magnitude, &exponent);  // [0.5, 1)
  const auto mantissa = static_cast<uint32_t>(std::nearbyint(std::ldexp(fraction, 11)));
  // A mantissa that rounds up to 2048 carries into the exponent by itself.
  return sign | ((static_cast<uint32_t>(exponent + 13) << 10) + mantissa);
}

}  // namespace

uint64_t Seed() {
  static const uint64_t seed = [] {
    const char* text = std::getenv("STRUCTKV_TEST_SEED");
    const uint64_t value = text != nullptr ? std::strtoull(text, nullptr, 10) : 20261124;
    std::cout << "STRUCTKV_TEST_SEED=" << value << std::endl;
    return value;
  }();
  return seed;
}

std::mt19937_64 Random(uint64_t number) {
  return std::mt19937_64(Seed() + number * 0x9E3779B97F4A7C15ULL);
}

uint32_t Encode(float value, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return Bits(value);
    case DType::kF16:
      return EncodeHalf(value);
    case DType::kBF16:
      return EncodeBfloat(value);
    case DType::kF8E4M3:
    case DType::kF8E5M2:
      return EncodeFp8(value, dtype);
  }
  return 0;
}

Tensor::Tensor(DType dtype, Layout layout, int64_t heads, int64_t tokens, int64_t dim,
               int64_t misalign)
    : bytes_(static_cast<size_t>(heads * tokens * dim) * DTypeSize(dtype) + 128) {
  const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
  const size_t offset = (64 - address % 64) % 64 + static_cast<size_t>(misalign);
  view_ = TensorView::Dense(bytes_.data() + offset, dtype, layout, heads, tokens, dim);
}

void Tensor::Fill(std::mt19937_64& random, float deviation) {
  std::normal_distribution<float> normal(0.0F, deviation);
  for (int64_t h = 0; h < view_.heads; ++h) {
    for (int64_t j = 0; j < view_.tokens; ++j) {
      for (int64_t e = 0; e < view_.dim; ++e) Set(h, j, e, normal(random));
    }
  }
}

void Tensor::Set(int64_t head, int64_t token, int64_t element, float value) {
  const uint32_t bits = Encode(value, view_.dtype);
  const size_t size = DTypeSize(view_.dtype);
  std::memcpy(mutable_view().Row(head, token) + element * static_cast<int64_t>(size), &bits, size);
}

MutableTensorView Tensor::mutable_view() {
  return {const_cast<void*>(view_.data),
          view_.dtype,
          view_.heads,
          view_.tokens,
          view_.dim,
          view_.head_stride,
          view_.token_stride,
          view_.block_tokens,
          view_.block_stride};
}

}  // namespace structkv::testing
