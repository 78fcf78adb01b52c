// A block of CUDA threads on the host: each thread is a fiber with a stack of its own. The lanes of
// a warp run in turns, each up to the next operation that it takes part in together with the
// others; warps run one after the other, each up to the next Sync, the last warp first in every
// second block.
//
// Fails the program where lanes of a warp, or warps of a block, do not meet at the same operation,
// and where a wide load is not aligned: on the GPU it would hang or fault.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/cuda/fragments.h"
#include "kernels/cuda/numbers.h"

namespace structkv::testing {

class EmulatedBlock {
 public:
  int thread() const { return current_; }
  int threads() const { return threads_; }
  int lane() const { return current_ % 32; }
  int warp() const { return current_ / 32; }
  int warps() const { return threads_ / 32; }
  int64_t index() const { return index_; }
  int64_t blocks() const { return blocks_; }

  void Sync() { Meet(At::kBlock); }
  float ShuffleXor(float value, int mask);
  void Min(uint64_t* least, uint64_t value) {
    if (value < *least) *least = value;
  }
  // Multiplications wait for each other, and are done when all lanes have called Multiplied.
  template <bool kHalf>
  void Multiply(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
    fibers_[static_cast<size_t>(current_)].products.push_back(
        {{a[0], a[1], a[2], a[3]}, {b0, b1}, c, kHalf});
  }
  void KeepOrder() {}
  void Multiplied();
  cuda::Words4 Once16(const void* from);
  void Once8(const void* from, uint32_t* two);
  cuda::Words4 Often16(const cuda::Words4* from) { return Once16(from); }

  // Runs `body` with every thread of every block.
  static void RunGrid(int64_t blocks, int threads, const std::function<void(EmulatedBlock&)>& body);

 private:
  enum class At : uint8_t { kStart, kWarp, kBlock, kEnd };
  // A lane's part of a multiplication.
  struct Product {
    uint32_t a[4];
    uint32_t b[2];
    float* c;
    bool half;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* sanitizer_stack = nullptr;
    At at = At::kStart;
    uint64_t meetings = 0;
    std::vector<Product> products;
  };

  EmulatedBlock(int64_t index, int64_t blocks, int threads,
                const std::function<void(EmulatedBlock&)>& body);
  void Run();
  void RunWarp(int warp);
  void Resume(int thread);
  void Meet(At at);
  static void Enter();
  // Does all that the lanes of a warp wait for.
  static void MultiplyAll(Fiber* lanes);

  const int64_t index_;
  const int64_t blocks_;
  const int threads_;
  const std::function<void(EmulatedBlock&)>& body_;
  int current_ = 0;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
  void* scheduler_sanitizer_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<float> shuffled_;  // [2, threads]: in turns, so that all have read before the next
};

}  // namespace structkv::testing
