// Every code of the 8-bit formats, in every decoder, against the formats' definition.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/kernel_table.h"
#include "kernels/reference/element.h"
#include "tests/kernels/fp8_codes.h"

namespace structkv {
namespace {

class Fp8Test : public ::testing::TestWithParam<DType> {};

// Equal with its sign, or NaN both.
void ExpectSame(double actual, double expected, int code) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(actual)) << "code " << code << " is " << actual;
    return;
  }
  EXPECT_EQ(actual, expected) << "code " << code;
  EXPECT_EQ(std::signbit(actual), std::signbit(expected)) << "code " << code;
}

// The figures that the specification gives.
TEST(Fp8FormatTest, DefinitionsHaveTheSpecificationsLimits) {
  EXPECT_EQ(testing::DecodeFp8(0x7E, DType::kF8E4M3), 448.0);
  EXPECT_EQ(testing::DecodeFp8(0x08, DType::kF8E4M3), std::ldexp(1.0, -6));
  EXPECT_EQ(testing::DecodeFp8(0x01, DType::kF8E4M3), std::ldexp(1.0, -9));
  EXPECT_EQ(testing::DecodeFp8(0x7B, DType::kF8E5M2), 57344.0);
  EXPECT_EQ(testing::DecodeFp8(0x04, DType::kF8E5M2), std::ldexp(1.0, -14));
  EXPECT_EQ(testing::DecodeFp8(0x01, DType::kF8E5M2), std::ldexp(1.0, -16));
  EXPECT_EQ(testing::DecodeFp8(0xFC, DType::kF8E5M2), -std::numeric_limits<double>::infinity());
}

TEST_P(Fp8Test, ReferenceDecodesEveryCode) {
  for (int code = 0; code < 256; ++code) {
    const auto byte = static_cast<std::byte>(code);
    ExpectSame(reference::Element(&byte, GetParam(), 0),
               testing::DecodeFp8(static_cast<uint8_t>(code), GetParam()), code);
  }
}

TEST_P(Fp8Test, EveryInstructionSetDecodesEveryCode) {
  for (const cpu::KernelTable& table : cpu::SupportedTables()) {
    SCOPED_TRACE(std::string(table.name));
    // Lengths that end in whole vectors, in halves and in single elements; every code in each place
    // of a vector.
    for (const int64_t count : {1, 7, 8, 40, 256, 263}) {
      for (int first = 0; first < 256; ++first) {
        std::vector<std::byte> codes(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<std::byte>(first + i);
        std::vector<float> out(static_cast<size_t>(count) + 1, -77.0F);
        table.to_f32(codes.data(), GetParam(), count, out.data());
        EXPECT_EQ(out.back(), -77.0F) << "wrote past the end";
        for (int64_t i = 0; i < count; ++i) {
          const auto code = static_cast<uint8_t>(codes[i]);
          ExpectSame(out[i], testing::DecodeFp8(code, GetParam()), code);
        }
      }
    }
  }
}

TEST_P(Fp8Test, WidensEveryCodeToBf16) {
  for (const cpu::KernelTable& table : cpu::SupportedTables()) {
    if (table.fp8_to_bf16 == nullptr) continue;
    SCOPED_TRACE(std::string(table.name));
    // Whole vectors and parts of one, in rows that lie apart in any order.
    for (const int64_t dim : {8, 40, 64, 256}) {
      constexpr int64_t kTokens = 64;
      const int64_t stride = dim + 3;
      std::vector<std::byte> codes(static_cast<size_t>(kTokens * stride));
      for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::byte>(i * 5);
      std::vector<const std::byte*> rows(kTokens);
      for (int64_t t = 0; t < kTokens; ++t) rows[t] = codes.data() + (kTokens - 1 - t) * stride;
      std::vector<uint16_t> out(static_cast<size_t>(kTokens * dim) + 1, 0xABCD);
      table.fp8_to_bf16({.rows = rows.data(),
                         .tokens = kTokens,
                         .dtype = GetParam(),
                         .dim = dim,
                         .out = reinterpret_cast<std::byte*>(out.data())});
      EXPECT_EQ(out.back(), 0xABCD) << "wrote past the end";
      for (int64_t t = 0; t < kTokens; ++t) {
        for (int64_t e = 0; e < dim; ++e) {
          const auto code = static_cast<uint8_t>(rows[t][e]);
          const auto* bf16 = reinterpret_cast<const std::byte*>(&out[t * dim + e]);
          ExpectSame(reference::Element(bf16, DType::kBF16, 0),
                     testing::DecodeFp8(code, GetParam()), code);
        }
      }
    }
  }
}

TEST_P(Fp8Test, EncodesWhatItDecodes) {
  for (int code = 0; code < 256; ++code) {
    const double value = testing::DecodeFp8(static_cast<uint8_t>(code), GetParam());
    if (std::isnan(value)) continue;
    EXPECT_EQ(testing::EncodeFp8(static_cast<float>(value), GetParam()), code);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Fp8Test, ::testing::Values(DType::kF8E4M3, DType::kF8E5M2),
                         [](const auto& instance) {
                           return std::string(DTypeName(instance.param));
                         });

}  // namespace
}  // namespace structkv
