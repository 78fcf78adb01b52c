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

// T tokens against R vectors of 16 rows. `near` and `far` are prefetched, in step with `keys`.
template <int T, int R>
inline void DotBlock(const int32_t* __restrict queries, const std::byte* keys, int64_t stride,
                     const std::byte* near, const std::byte* far, int64_t dim,
                     float* __restrict out) {
  constexpr int64_t kRows = R * 16;
  __m512 acc[T][R];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[t][r] = _mm512_setzero_ps();
  }
  const int64_t pairs = dim / 2;
  for (int64_t i = 0; i < pairs; i += 4) {
    if (i % 16 == 0) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        _mm_prefetch(reinterpret_cast<const char*>(far + t * stride + i * 4), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(near + t * stride + i * 4), _MM_HINT_T0);
      }
    }
#pragma GCC unroll 2
    for (int64_t p = i; p < i + 4; ++p) {
      __m512bh q[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        q[r] = reinterpret_cast<__m512bh>(_mm512_load_si512(queries + p * kRows + r * 16));
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const __m512bh k = Broadcast(keys + t * stride + p * 4);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[t][r] = _mm512_dpbf16_ps(acc[t][r], q[r], k);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) _mm512_store_ps(out + t * kRows + r * 16, acc[t][r]);
  }
}

template <int R>
void ScoresR(const ScoreTile& tile) {
  constexpr int64_t kBlock = 12;  // 24 accumulators of 32 registers
  const int32_t* queries = static_cast<const int32_t*>(tile.queries);
  const int64_t stride = tile.token_stride_bytes;
  const int64_t near_tokens = kKeysNearBytes / (2 * tile.dim);
  const int64_t far_tokens = kKeysFarBytes / (2 * tile.dim);
  int64_t t = 0;
  for (; t + kBlock <= tile.tokens; t += kBlock) {
    const std::byte* keys = tile.keys + t * stride;
    const int64_t last = tile.tokens + tile.tokens_after - kBlock - t;
    const int64_t near = last < near_tokens ? last : near_tokens;
    const int64_t far = last < far_tokens ? last : far_tokens;
    DotBlock<kBlock, R>(queries, keys, stride, keys + near * stride, keys + far * stride, tile.dim,
                        tile.out + t * R * 16);
  }
  for (; t < tile.tokens; ++t) {
    const std::byte* keys = tile.keys + t * stride;
    DotBlock<1, R>(queries, keys, stride, keys, keys, tile.dim, tile.out + t * R * 16);
  }
}

}  // namespace

bool HaveAvx512Bf16() {
  return __builtin_cpu_supports("avx512bf16") != 0 && __builtin_cpu_supports("avx512f") != 0 &&
         __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512bw") != 0;
}

void ScoresAvx512Bf16(const ScoreTile& tile) {
  if (tile.rows == 32) {
    ScoresR<2>(tile);
  } else {
    ScoresR<1>(tile);
  }
}

}  // namespace structkv::cpu

#else

namespace structkv::cpu {

bool HaveAvx512Bf16() { return false; }

void ScoresAvx512Bf16(const ScoreTile& /*tile*/) {}

}  // namespace structkv::cpu

#endif
