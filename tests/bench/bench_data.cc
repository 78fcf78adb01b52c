#include "tests/bench/bench_data.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

namespace structkv::bench {
namespace {

// The upper half of a float32, or the nearest float16 for the small normal values used here.
uint16_t ToHalf(DType dtype, float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (dtype == DType::kBF16) return static_cast<uint16_t>(bits >> 16);
  const uint32_t sign = bits >> 16 & 0x8000U;
  const int32_t exponent = static_cast<int32_t>(bits >> 23 & 0xFFU) - 112;
  if (exponent <= 0) return static_cast<uint16_t>(sign);
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 |
                               (bits >> 13 & 0x3FFU));
}

// As near as the 8-bit formats come to it from below.
uint8_t ToFp8(DType dtype, float value) {
  if (dtype == DType::kF8E5M2) return static_cast<uint8_t>(ToHalf(DType::kF16, value) >> 8);
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 24 & 0x80U;
  const int32_t exponent = static_cast<int32_t>(bits >> 23 & 0xFFU) - 120;
  if (exponent <= 0) return static_cast<uint8_t>(sign);
  return static_cast<uint8_t>(sign | static_cast<uint32_t>(exponent) << 3 | (bits >> 20 & 7U));
}

}  // namespace

Tensor::Tensor(DType dtype, int64_t heads, int64_t tokens, Layout layout, int64_t dim)
    : dtype_(dtype),
      layout_(layout),
      heads_(heads),
      tokens_(tokens),
      dim_(dim),
      data_(engine::BufferPool(0).Acquire(static_cast<size_t>(heads * tokens * dim) *
                                          DTypeSize(dtype))) {
  // A table of values at random, repeated from random places: quick to make, and as random to the
  // kernels.
  std::mt19937 random(static_cast<uint32_t>(heads + tokens));
  std::normal_distribution<float> normal;
  std::vector<float> table(1 << 16);
  for (float& value : table) value = normal(random);
  const int64_t rows = heads * tokens;
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = &table[random() % (table.size() - static_cast<size_t>(dim))];
    std::byte* to = data_.data() + row * dim * static_cast<int64_t>(DTypeSize(dtype));
    if (dtype == DType::kF32) {
      std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(float));
      continue;
    }
    for (int64_t i = 0; i < dim; ++i) {
      if (IsFp8(dtype)) {
        to[i] = static_cast<std::byte>(ToFp8(dtype, from[i]));
        continue;
      }
      const uint16_t half = ToHalf(dtype, from[i]);
      std::memcpy(to + i * 2, &half, sizeof(half));
    }
  }
}

TensorView Tensor::view() const {
  return TensorView::Dense(data_.data(), dtype_, layout_, heads_, tokens_, dim_);
}

TensorView Tensor::paged_view(const std::vector<int32_t>& table, int64_t block_tokens) const {
  return TensorView::Paged(data_.data(), dtype_, layout_, heads_, tokens_, dim_, table.data(),
                           block_tokens);
}

MutableTensorView Tensor::mutable_view() {
  return MutableTensorView::Dense(data_.data(), dtype_, layout_, heads_, tokens_, dim_);
}

std::vector<int32_t> ShuffledBlocks(int64_t tokens, int64_t block_tokens) {
  std::vector<int32_t> table(static_cast<size_t>(tokens / block_tokens));
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), std::mt19937(7));
  return table;
}

std::vector<float> SaliencyLike(int64_t tokens, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> scores(static_cast<size_t>(tokens));
  for (float& score : scores) score = std::exp(normal(random)) / static_cast<float>(tokens);
  return scores;
}

double Seconds(absl::FunctionRef<void()> work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace structkv::bench
