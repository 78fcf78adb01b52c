// Compiled for AVX-512 BF16 where the compiler can (Highway 1.0.3 has no such target). So that no
// other file's inline functions are emitted here with those instructions, this one includes nothing
// that has any which are called.
#include "kernels/cpu/scores_avx512_bf16.h"

#if defined(__AVX512BF16__) && defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

namespace structkv::cpu {
namespace {

inline __m512bh Broadcast(const std::byte* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof(bits));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}

// Stores the scores themselves.
template <int R>
struct AsTheyAre {
  template <int T>
  void Store(const __m512 (&acc)[T][R], int64_t token) {
    float* to = out + token * R * 16;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) _mm512_store_ps(to + (t * R + r) * 16, acc[t][r]);
    }
  }

  float* out;
};

// Exp2 of exp2-inl.h to the bit, down to 2^-126; Inf, NaN and smaller values as they should be.
inline __m512 Exp2(__m512 x) {
  constexpr int kMinusNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 f = _mm512_reduce_ps(x, kMinusNearest);
  __m512 p = _mm512_set1_ps(0.001326472731307149F);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009671512991189957F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05550733581185341F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022242426872253F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931470036506653F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0F));
  return _mm512_maskz_scalef_ps(0xFFFF, p, _mm512_sub_ps(x, f));
}

inline void StoreRows(__m512 p, float* out) { _mm512_store_ps(out, p); }
inline void StoreRows(__m512 p, uint16_t* out) {
  _mm256_store_si256(
      reinterpret_cast<__m256i*>(out),
      _mm512_maskz_cvtps_ph(0xFFFF, p, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Stores 2^(score * factor - shift) as `To`, and sums them. The next block's dot products need
// other units than most of this does, and run beside it.
template <int R, class To>
struct Exponentials {
  template <int T>
  void Store(const __m512 (&acc)[T][R], int64_t token) {
    constexpr int kLine = 64 / sizeof(To);
    To* to = out + token * R * 16;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512 x = _mm512_fmsub_ps(acc[t][r], factor, shift[r]);
        const __m512 p = Exp2(x);
        StoreRows(p, to + (t * R + r) * 16);
        if ((t * R + r) * 16 % kLine == 0) {
          _mm_prefetch(reinterpret_cast<const char*>(to + after + (t * R + r) * 16), _MM_HINT_T1);
        }
        sum[r] = _mm512_add_ps(sum[r], p);
        check[r] = _mm512_add_ps(check[r], x);
      }
    }
  }

  To* out;
  int64_t after;  // from `out` to what is prefetched
  __m512 factor;
  __m512 shift[R];
  __m512 sum[R];
  __m512 check[R];  // infinities stay visible here; their exponentials may be 0
};

// Twelve tokens' keys to ask for that lie a stride apart, a part in each 4 pairs of 16. Always
// inline: a function that does nothing but prefetch is pure to GCC, and its calls are left out.
struct Strided {
  __attribute__((always_inline)) void Ask(int64_t i) const {
    // Three tokens' next line, of each token once in 16 pairs.
    const int64_t ahead = 3 * ((i / 4) % 4) * stride + i / 16 * 64;
#pragma GCC unroll 4
    for (int n = 0; n < 3; ++n) {
      _mm_prefetch(reinterpret_cast<const char*>(far + ahead + n * stride), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(near + ahead + n * stride), _MM_HINT_T0);
    }
  }

  const std::byte* near;
  const std::byte* far;
  int64_t stride;
};

// Twelve that lie anywhere, with `step` bytes to 16 pairs.
struct Scattered {
  __attribute__((always_inline)) void Ask(int64_t i) const {
    const std::byte* const* three = rows + 3 * ((i / 4) % 4);
#pragma GCC unroll 4
    for (int n = 0; n < 3; ++n) {
      _mm_prefetch(reinterpret_cast<const char*>(three[n] + i / 16 * step), _MM_HINT_T1);
    }
  }

  const std::byte* const* rows;
  int64_t step;
};

// T tokens, of which `token` is the first, against R vectors of 16 rows. `ahead` is prefetched, in
// step with `keys`.
template <int T, int R, class Ahead, class Results>
inline void DotBlock(const int32_t* __restrict queries, const std::byte* keys, int64_t stride,
                     const Ahead& ahead, int64_t dim, Results& results, int64_t token) {
  constexpr int64_t kRows = R * 16;
  __m512 acc[T][R];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[t][r] = _mm512_setzero_ps();
  }
  // The key of token 3 * g + n is at base[g] + n * stride, an address of one instruction: with a
  // pointer for each the general registers would not do.
  constexpr int kBases = (T + 2) / 3;
  const std::byte* base[kBases];
#pragma GCC unroll 4
  for (int g = 0; g < kBases; ++g) base[g] = keys + 3 * g * stride;
  const int64_t pairs = dim / 2;
  for (int64_t i = 0; i < pairs; i += 4) {
    if (T > 1) ahead.Ask(i);
#pragma GCC unroll 4
    for (int g = 0; g < kBases; ++g) asm("" : "+r"(base[g]));  // keeps them the only ones
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      __m512bh q[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        q[r] = reinterpret_cast<__m512bh>(_mm512_load_si512(queries + p * kRows + r * 16));
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const __m512bh k = Broadcast(base[t / 3] + t % 3 * stride + p * 4);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[t][r] = _mm512_dpbf16_ps(acc[t][r], q[r], k);
      }
    }
    queries += 4 * kRows;
#pragma GCC unroll 4
    for (int g = 0; g < kBases; ++g) base[g] += 16;
  }
  results.Store(acc, token);
}

template <int R, class Results>
inline void ForTile(const ScoreTile& tile, Results& results) {
  constexpr int64_t kBlock = 12;  // 24 accumulators of 32 registers
  const int32_t* queries = static_cast<const int32_t*>(tile.queries);
  const int64_t stride = tile.token_stride_bytes;
  const int64_t near_tokens = kKeysNearBytes / (2 * tile.dim);
  const int64_t far_tokens = kKeysFarBytes / (2 * tile.dim);
  int64_t t = 0;
  for (; t + kBlock <= tile.tokens; t += kBlock) {
    const std::byte* keys = tile.keys + t * stride;
    if (tile.ask != nullptr) {
      const Scattered ahead = {tile.ask + t, 32 * tile.ask_element_bytes};
      DotBlock<kBlock, R>(queries, keys, stride, ahead, tile.dim, results, t);
      continue;
    }
    const int64_t last = tile.tokens + tile.tokens_after - kBlock - t;
    const int64_t near = last < near_tokens ? last : near_tokens;
    const int64_t far = last < far_tokens ? last : far_tokens;
    const Strided ahead = {keys + near * stride, keys + far * stride, stride};
    DotBlock<kBlock, R>(queries, keys, stride, ahead, tile.dim, results, t);
  }
  for (; t < tile.tokens; ++t) {
    const std::byte* keys = tile.keys + t * stride;
    DotBlock<1, R>(queries, keys, stride, Strided(), tile.dim, results, t);
  }
}

template <int R>
void ScoresR(const ScoreTile& tile) {
  AsTheyAre<R> results;
  results.out = static_cast<float*>(tile.out);
  ForTile<R>(tile, results);
}

template <int R, class To>
bool ExponentialsR(const ScoreTile& tile, float factor, const float* shift, float* sum,
                   float* check) {
  Exponentials<R, To> results;
  results.out = static_cast<To*>(tile.out);
  results.after =
      tile.out_after == nullptr ? 0 : reinterpret_cast<const To*>(tile.out_after) - results.out;
  results.factor = _mm512_set1_ps(factor);
  for (int r = 0; r < R; ++r) {
    results.shift[r] = _mm512_loadu_ps(shift + r * 16);
    results.sum[r] = _mm512_loadu_ps(sum + r * 16);
    results.check[r] = _mm512_loadu_ps(check + r * 16);
  }
  ForTile<R>(tile, results);
  bool finite = true;
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(sum + r * 16, results.sum[r]);
    _mm512_storeu_ps(check + r * 16, results.check[r]);
    const __m512 poison = _mm512_mul_ps(results.check[r], _mm512_setzero_ps());
    finite &= _mm512_cmp_ps_mask(poison, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xFFFF;
  }
  return finite;
}

// The bf16 bits of every code of an 8-bit format, its sign aside.
struct Fp8Codes {
  uint16_t bits[128];
};

// kMantissa bits of mantissa, an exponent biased by kBias.
template <int kMantissa, int kBias>
constexpr Fp8Codes MakeFp8Codes() {
  constexpr int kOne = 1 << kMantissa;
  Fp8Codes codes = {};
  for (int code = 0; code < 128; ++code) {
    int exponent = code >> kMantissa;
    int mantissa = code & (kOne - 1);
    if (exponent == 0 && mantissa != 0) {
      // A denormal, which is a normal number in bf16.
      for (exponent = 1; mantissa < kOne; mantissa *= 2) --exponent;
      mantissa -= kOne;
      codes.bits[code] =
          static_cast<uint16_t>(((exponent + 127 - kBias) << 7) + (mantissa << (7 - kMantissa)));
    } else if (code != 0) {
      codes.bits[code] =
          static_cast<uint16_t>(((exponent + 127 - kBias) << 7) + (mantissa << (7 - kMantissa)));
    }
  }
  return codes;
}

constexpr Fp8Codes MakeE4M3Codes() {
  Fp8Codes codes = MakeFp8Codes<3, 7>();
  codes.bits[0x7F] = 0x7FC0;
  return codes;
}

constexpr Fp8Codes MakeE5M2Codes() {
  Fp8Codes codes = MakeFp8Codes<2, 15>();
  codes.bits[0x7C] = 0x7F80;
  for (int code = 0x7D; code < 128; ++code) codes.bits[code] = 0x7FC0;
  return codes;
}

alignas(64) constexpr Fp8Codes kE4M3Codes = MakeE4M3Codes();
alignas(64) constexpr Fp8Codes kE5M2Codes = MakeE5M2Codes();

// 32 codes at a time by looking each up.
class Fp8Lookup {
 public:
  explicit Fp8Lookup(DType dtype) {
    const uint16_t* bits = dtype == DType::kF8E4M3 ? kE4M3Codes.bits : kE5M2Codes.bits;
    for (int i = 0; i < 4; ++i) table_[i] = _mm512_load_si512(bits + 32 * i);
  }

  __m512i Widen(__m256i codes) const {
    const __m512i wide = _mm512_cvtepu8_epi16(codes);
    const __m512i low = _mm512_permutex2var_epi16(table_[0], wide, table_[1]);
    const __m512i high = _mm512_permutex2var_epi16(table_[2], wide, table_[3]);
    const __mmask32 upper = _mm512_test_epi16_mask(wide, _mm512_set1_epi16(0x40));
    const __m512i magnitude = _mm512_mask_blend_epi16(upper, low, high);
    // magnitude | (sign & 0x8000)
    return _mm512_ternarylogic_epi32(magnitude, _mm512_slli_epi16(wide, 8),
                                     _mm512_set1_epi16(static_cast<int16_t>(0x8000)), 0xF8);
  }

 private:
  __m512i table_[4];
};

}  // namespace

void Fp8ToBf16Avx512(const KeyRows& rows) {
  const Fp8Lookup lookup(rows.dtype);
  std::byte* to = rows.out;
  for (int64_t t = 0; t < rows.tokens; ++t, to += 2 * rows.dim) {
    const std::byte* from = rows.rows[t];
    int64_t i = 0;
    for (; i + 32 <= rows.dim; i += 32) {
      const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      _mm512_storeu_si512(to + 2 * i, lookup.Widen(codes));
    }
    if (i < rows.dim) {
      const __mmask32 rest = (1U << (rows.dim - i)) - 1;
      const __m256i codes = _mm256_maskz_loadu_epi8(rest, from + i);
      _mm512_mask_storeu_epi16(to + 2 * i, rest, lookup.Widen(codes));
    }
  }
}

bool HaveAvx512Bf16() {
  return __builtin_cpu_supports("avx512bf16") != 0 && __builtin_cpu_supports("avx512f") != 0 &&
         __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0;
}

void ScoresAvx512Bf16(const ScoreTile& tile) {
  if (tile.rows == 32) {
    ScoresR<2>(tile);
  } else {
    ScoresR<1>(tile);
  }
}

bool ExponentialsAvx512Bf16(const ScoreTile& tile, float factor, const float* shift, float* sum,
                            float* check) {
  return tile.rows == 32 ? ExponentialsR<2, float>(tile, factor, shift, sum, check)
                         : ExponentialsR<1, float>(tile, factor, shift, sum, check);
}

bool HalfExponentialsAvx512Bf16(const ScoreTile& tile, float factor, const float* shift, float* sum,
                                float* check) {
  return tile.rows == 32 ? ExponentialsR<2, uint16_t>(tile, factor, shift, sum, check)
                         : ExponentialsR<1, uint16_t>(tile, factor, shift, sum, check);
}

}  // namespace structkv::cpu

#else

namespace structkv::cpu {

bool HaveAvx512Bf16() { return false; }

void Fp8ToBf16Avx512(const KeyRows& /*rows*/) {}

void ScoresAvx512Bf16(const ScoreTile& /*tile*/) {}

bool ExponentialsAvx512Bf16(const ScoreTile& /*tile*/, float /*factor*/, const float* /*shift*/,
                            float* /*sum*/, float* /*check*/) {
  return false;
}

bool HalfExponentialsAvx512Bf16(const ScoreTile& /*tile*/, float /*factor*/, const float* /*shift*/,
                                float* /*sum*/, float* /*check*/) {
  return false;
}

}  // namespace structkv::cpu

#endif
