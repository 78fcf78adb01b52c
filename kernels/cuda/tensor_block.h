// What the saliency kernels' threads do together beyond what any do, by the device's own
// instructions.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_block.h"
#include "kernels/cuda/numbers.h"

namespace structkv::cuda {

// All lanes of a warp call Multiply and Multiplied.
class TensorBlock : public DeviceBlock {
 public:
  // c += a b, mma.sync.m16n8k16 of float16 or bfloat16 (sm_80), fragments as in fragments.h.
  template <bool kHalf>
  __device__ void Multiply(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
    if constexpr (kHalf) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
  }

  // Loads are not moved across it: an assembler that loads everything first runs out of registers,
  // and one that puts loads off has less in flight.
  __device__ void KeepOrder() { __syncwarp(); }

  // Comes before the first use of what Multiply has made. Here it is there at once.
  __device__ void Multiplied() {}

  // 16 or 8 bytes of what the kernel reads once and nobody writes meanwhile: leaves the L1 cache to
  // the queries.
  __device__ Words4 Once16(const void* from) {
    Words4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
        : "l"(from));
    return v;
  }
  __device__ void Once8(const void* from, uint32_t* two) {
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
        : "=r"(two[0]), "=r"(two[1])
        : "l"(from));
  }
  // 16 bytes that are read again and again, written by an earlier kernel.
  __device__ Words4 Often16(const Words4* from) {
    Words4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(from));
    return v;
  }
};

}  // namespace structkv::cuda
