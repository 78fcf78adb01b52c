// Kernels that the build must refuse (cmake/Cuda.cmake): one whose registers spill, one whose array is
// indexed at run time.
extern "C" __global__ void __launch_bounds__(1024, 2) Spills(const float* from, float* to) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = from[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) {
#pragma unroll
    for (int j = 0; j < 64; ++j) values[i] = values[i] * values[j] + 1.0F;
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) to[i * 1024 + threadIdx.x] = values[i];
}

extern "C" __global__ void Indexes(const float* from, float* to, int step) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = from[i * 1024 + threadIdx.x];
  for (int i = 0; i < 64; ++i) to[i * 1024 + threadIdx.x] = values[(i * step + threadIdx.x) % 64];
}
