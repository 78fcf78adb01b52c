// What a core can multiply and add at most: long chains of independent multiply-adds in registers.
// The floor that saliency is held against, measured in the same run.
#pragma once

#include <string_view>

namespace structkv::bench {

enum class Arithmetic { kF32, kBf16Pairs };

// Floating-point operations per second of `threads` threads that run at once: the best of several
// short runs, `seconds` in all. `target` names an instruction set as cpu::CpuTargets() does; 0
// where the set has no such instruction.
double PeakFlops(std::string_view target, Arithmetic arithmetic, int threads, double seconds);

// For PeakFlops: `rounds` rounds on the calling thread. Returns operations done.
using PeakLoop = double (*)(int rounds);
// Null where this build or this machine has no AVX-512 BF16.
PeakLoop Bf16PairsLoop();

// Keeps the compiler from dropping a loop's result.
void Consume(float value);

}  // namespace structkv::bench
