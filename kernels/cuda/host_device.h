// Qualifiers of functions that kernels and host code share: empty where no CUDA compiler reads
// them, so that the tests compile a kernel's own code for the host.
#pragma once

#ifdef __CUDACC__
// Callable from both.
#define STRUCTKV_HOST_DEVICE __host__ __device__
// A part of a kernel, for the GPU (or, in the tests, the emulated one) alone.
#define STRUCTKV_DEVICE __device__
#else
#define STRUCTKV_HOST_DEVICE
#define STRUCTKV_DEVICE
#endif

// Before a loop that has to be unrolled, so that arrays that it indexes stay in registers, or only
// four rounds at a time, or must not be, for want of them.
#ifdef __CUDA_ARCH__
#define STRUCTKV_UNROLL _Pragma("unroll")
#define STRUCTKV_UNROLL_4 _Pragma("unroll 4")
#define STRUCTKV_ROLLED _Pragma("unroll 1")
#else
#define STRUCTKV_UNROLL
#define STRUCTKV_UNROLL_4
#define STRUCTKV_ROLLED
#endif
