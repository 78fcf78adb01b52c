// Qualifiers of functions that kernels and host code share: empty where no CUDA compiler reads
// them, so that the tests compile a kernel's own code for the host.
#pragma once

#ifdef __CUDACC__
// Callable from both.
#define STRUCTKV_HOST_DEVICE __host__ __device__
// A part of a kernel, for the GPU (or, in the tests, the emulated one) alone.
#define STRUCTKV_DEVICE __device__ __forceinline__
#else
#define STRUCTKV_HOST_DEVICE
#define STRUCTKV_DEVICE inline
#endif
