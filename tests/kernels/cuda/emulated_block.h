// Blocks of CUDA threads on the host, alone, in a grid or in a cluster: each thread is a fiber, and
// fibers that wait for nothing go on in a random order, so that a barrier that is missing shows.
// EmulatedBlock is the twin of DeviceBlock and TensorBlock (kernels/cuda/device_block.h,
// tensor_block.h).
//
// Fails the program where threads wait for others that never come, or meet them at another
// operation, and where a wide load is not aligned: on the GPU it would hang or fault.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cuda/numbers.h"

namespace structkv::testing {

class EmulatedCluster;

// What one thread sees.
class EmulatedBlock {
 public:
  static constexpr int kLanes = 32;

  int thread() const { return thread_; }
  int threads() const;
  int lane() const { return thread_ % kLanes; }
  int warp() const { return thread_ / kLanes; }
  int warps() const { return threads() / kLanes; }
  int64_t index() const { return index_; }
  int64_t blocks() const { return blocks_; }
  int rank() const { return rank_; }
  int ranks() const;

  void Sync();
  void SyncCluster();
  uint32_t Ballot(bool predicate);
  template <class T>
  T Shuffle(T value, int from_lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(value));
    bits = Exchange(bits)[from_lane & (kLanes - 1)];
    memcpy(&value, &bits, sizeof(value));
    return value;
  }
  template <class T>
  T ShuffleXor(T value, int mask) {
    return Shuffle(value, lane() ^ mask);
  }
  uint32_t SumWarp(uint32_t value);

  uint32_t Add(uint32_t* counter, uint32_t count) {
    const uint32_t before = *counter;
    *counter += count;
    return before;
  }
  void Min(uint64_t* least, uint64_t value) {
    if (value < *least) *least = value;
  }
  void Fence() {}
  template <class T>
  T Fresh(const T* from) {
    return *from;
  }
  template <class T>
  T Once(const T* from) {
    T value;
    Load(from, sizeof(T), &value);
    return value;
  }
  void Prefetch(const void* /*from*/) {}
  template <class T>
  const T* Peer(const T* shared, int of_rank) {
    return reinterpret_cast<const T*>(
        PeerBytes(reinterpret_cast<const std::byte*>(shared), of_rank));
  }

  // Multiplications wait for each other, and are done when all lanes have called Multiplied.
  template <bool kHalf>
  void Multiply(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
    products_.push_back({{a[0], a[1], a[2], a[3]}, {b0, b1}, c, kHalf});
  }
  void KeepOrder() {}
  void Multiplied();
  cuda::Words4 Once16(const void* from) { return Once(static_cast<const cuda::Words4*>(from)); }
  void Once8(const void* from, uint32_t* two) { Load(from, 8, two); }
  cuda::Words4 Often16(const cuda::Words4* from) { return Once(from); }

 private:
  friend class EmulatedCluster;

  // A lane's part of a multiplication.
  struct Product {
    uint32_t a[4];
    uint32_t b[2];
    float* c;
    bool half;
  };

  // All lanes' values, valid until this lane's next exchange but one.
  const uint64_t* Exchange(uint64_t value);
  const std::byte* PeerBytes(const std::byte* shared, int of_rank) const;
  static void Load(const void* from, size_t bytes, void* to);

  EmulatedCluster* cluster_ = nullptr;
  int thread_ = 0;
  int rank_ = 0;
  int64_t index_ = 0;
  int64_t blocks_ = 1;
  uint64_t exchanges_ = 0;
  std::vector<Product> products_;
  ucontext_t context_;
  std::unique_ptr<char[]> stack_;
  void* sanitizer_stack_ = nullptr;
  bool done_ = false;
};

class EmulatedCluster {
 public:
  using Body = std::function<void(EmulatedBlock&, void* shared)>;

  // Runs `body` with every thread of `ranks` blocks, whose shared memory has `shared_bytes`. What
  // of it was not written is NaN.
  static void RunCluster(int ranks, int threads, size_t shared_bytes, std::mt19937_64& random,
                         const Body& body);
  // Runs the blocks of a grid one after the other, in a random order.
  static void RunGrid(int64_t blocks, int threads, size_t shared_bytes, std::mt19937_64& random,
                      const Body& body);

 private:
  friend class EmulatedBlock;

  enum class Operation : uint8_t { kSync, kSyncCluster, kExchange, kMultiplied };
  // Threads that meet.
  struct Meeting {
    int expected = 0;
    Operation operation = Operation::kSync;
    std::vector<EmulatedBlock*> waiting;
  };

  EmulatedCluster(int ranks, int threads, size_t shared_bytes, std::mt19937_64& random,
                  const Body& body);
  void Run(int64_t index, int64_t blocks);
  void Meet(EmulatedBlock* thread, Meeting* meeting, Operation operation);
  Meeting* WarpOf(const EmulatedBlock& thread);
  std::byte* Shared(int rank);
  static void MultiplyAll(const std::vector<EmulatedBlock*>& lanes);
  static void Prepare(EmulatedBlock* thread);
  // Goes on with one of those that wait for nothing, the scheduler if there is none, and leaves
  // `from`, which is null where it has ended.
  void Switch(ucontext_t* from, void** save);
  static void Enter();

  const int ranks_;
  const int threads_;
  const size_t shared_bytes_;
  std::mt19937_64& random_;
  const Body& body_;
  std::vector<EmulatedBlock> all_;
  std::vector<EmulatedBlock*> ready_;
  std::vector<Meeting> warps_;
  std::vector<Meeting> blocks_;
  Meeting cluster_;
  std::vector<uint64_t> exchanged_;  // [2, all threads]
  std::vector<std::max_align_t> shared_;
  EmulatedBlock* current_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
  void* scheduler_sanitizer_ = nullptr;
};

}  // namespace structkv::testing
