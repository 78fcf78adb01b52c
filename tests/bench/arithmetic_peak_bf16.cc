#include "tests/bench/arithmetic_peak.h"

#if defined(__AVX512BF16__) && defined(__x86_64__)

#include <immintrin.h>

namespace structkv::bench {
namespace {

double Loop(int rounds) {
  constexpr int kChains = 12;
  constexpr int kInner = 1000;
  __m512 acc[kChains];
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) acc[c] = _mm512_set1_ps(static_cast<float>(c));
  __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3a803a80));
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < kInner; ++i) {
      asm volatile("" : "+v"(a));
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) acc[c] = _mm512_dpbf16_ps(acc[c], a, a);
    }
  }
  float sum = 0;
  for (const __m512& each : acc) {
    float lanes[16];
    _mm512_storeu_ps(lanes, each);
    for (const float lane : lanes) sum += lane;
  }
  Consume(sum);
  return 4.0 * kChains * kInner * 16 * rounds;
}

}  // namespace

PeakLoop Bf16PairsLoop() { return __builtin_cpu_supports("avx512bf16") != 0 ? &Loop : nullptr; }

}  // namespace structkv::bench

#else

namespace structkv::bench {

PeakLoop Bf16PairsLoop() { return nullptr; }

}  // namespace structkv::bench

#endif
