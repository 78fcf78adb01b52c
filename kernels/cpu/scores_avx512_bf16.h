// Scores of bf16 keys with the dot products of AVX-512 BF16.
#pragma once

#include "kernels/cpu/kernel_table.h"

namespace structkv::cpu {

// Whether this build and this machine have AVX-512 BF16.
bool HaveAvx512Bf16();

// KernelTable::bf16_scores. Only where HaveAvx512Bf16(). Denormal elements count as zero.
void ScoresAvx512Bf16(const ScoreTile& tile);

// KernelTable::bf16_exponentials. Only where HaveAvx512Bf16().
bool ExponentialsAvx512Bf16(const ScoreTile& tile, float factor, const float* shift, float* sum,
                            float* check);

// KernelTable::bf16_half_exponentials. Only where HaveAvx512Bf16().
bool HalfExponentialsAvx512Bf16(const ScoreTile& tile, float factor, const float* shift, float* sum,
                                float* check);

// KernelTable::fp8_to_bf16. Only where HaveAvx512Bf16().
void Fp8ToBf16Avx512(const KeyRows& rows);

}  // namespace structkv::cpu
