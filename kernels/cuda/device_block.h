// What a kernel's threads can do together, by the device's own instructions. Kernels are templates
// over such a class; tests/kernels/cuda/emulated_block.h has its twin, with which they run on
// the host.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace structkv::cuda {

// One block of a grid. All lanes of a warp call what ends in "Warp", and Ballot, Shuffle and
// ShuffleXor; all threads of the block Sync; all threads of the cluster SyncCluster.
class DeviceBlock {
 public:
  static constexpr int kLanes = 32;

  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ int lane() const { return thread() % kLanes; }
  __device__ int warp() const { return thread() / kLanes; }
  __device__ int warps() const { return threads() / kLanes; }
  // Of the grid's first axis.
  __device__ int64_t index() const { return blockIdx.x; }
  __device__ int64_t blocks() const { return gridDim.x; }

  __device__ void Sync() { __syncthreads(); }
  __device__ uint32_t Ballot(bool predicate) { return __ballot_sync(kAll, predicate); }
  template <class T>
  __device__ T Shuffle(T value, int from_lane) {
    return __shfl_sync(kAll, value, from_lane);
  }
  template <class T>
  __device__ T ShuffleXor(T value, int mask) {
    return __shfl_xor_sync(kAll, value, mask);
  }
  __device__ uint32_t SumWarp(uint32_t value) { return __reduce_add_sync(kAll, value); }

  // Adds to a counter in shared or device memory; returns what it was.
  __device__ uint32_t Add(uint32_t* counter, uint32_t count) { return atomicAdd(counter, count); }
  __device__ void Min(uint64_t* least, uint64_t value) {
    atomicMin(reinterpret_cast<unsigned long long*>(least), static_cast<unsigned long long>(value));
  }
  // What this thread wrote to device memory before is seen by whoever sees what it writes after.
  __device__ void Fence() { __threadfence(); }
  // Reads what other blocks of this grid have written.
  template <class T>
  __device__ T Fresh(const T* from) {
    return __ldcg(from);
  }
  // Reads what is read once.
  template <class T>
  __device__ T Once(const T* from) {
    if constexpr (sizeof(T) == sizeof(uint4)) {
      const uint4 wide = __ldcs(reinterpret_cast<const uint4*>(from));
      return T{{wide.x, wide.y, wide.z, wide.w}};
    } else if constexpr (sizeof(T) == sizeof(uint2)) {
      const uint2 wide = __ldcs(reinterpret_cast<const uint2*>(from));
      return T{{wide.x, wide.y}};
    } else {
      return __ldcs(from);
    }
  }
  // A hint that it will be read from device memory.
  __device__ void Prefetch(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  }

  // The blocks of a cluster have the same shared memory; Peer is another's. Chips before sm_90 have
  // clusters of one block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __device__ int rank() const {
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
  }
  __device__ int ranks() const {
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
  }
  // What threads have written to their own block's shared memory before is seen by the whole
  // cluster after it, and what they have read of others' and used was read before. Device memory is
  // left out: to order that too, as cooperative_groups' barrier does, takes a trip to the L2 cache.
  __device__ void SyncCluster() {
    asm volatile(
        "fence.release.sync_restrict::shared::cta.cluster;\n"
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
  }
  template <class T>
  __device__ const T* Peer(const T* shared, int of_rank) {
    return cooperative_groups::this_cluster().map_shared_rank(const_cast<T*>(shared), of_rank);
  }
#else
  __device__ int rank() const { return 0; }
  __device__ int ranks() const { return 1; }
  __device__ void SyncCluster() { __syncthreads(); }
  template <class T>
  __device__ const T* Peer(const T* shared, int /*of_rank*/) {
    return shared;
  }
#endif

 private:
  static constexpr uint32_t kAll = 0xFFFFFFFFU;
};

}  // namespace structkv::cuda
