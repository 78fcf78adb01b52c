#include "tests/kernels/cuda/emulated_block.h"

#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define STRUCTKV_FIBERS_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define STRUCTKV_FIBERS_SANITIZED 1
#endif
#endif
#ifdef STRUCTKV_FIBERS_SANITIZED
#include <sanitizer/common_interface_defs.h>
#endif

namespace structkv::testing {
namespace {

constexpr size_t kStackBytes = size_t{64} << 10;

// makecontext takes no pointer; one block runs at a time on a thread.
thread_local EmulatedBlock* running = nullptr;

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "emulated block: %s\n", what);
  std::abort();
}

void StartSwitch(void** save, const void* stack, size_t bytes) {
#ifdef STRUCTKV_FIBERS_SANITIZED
  __sanitizer_start_switch_fiber(save, stack, bytes);
#else
  (void)save, (void)stack, (void)bytes;
#endif
}

void FinishSwitch(void* saved, const void** stack, size_t* bytes) {
#ifdef STRUCTKV_FIBERS_SANITIZED
  __sanitizer_finish_switch_fiber(saved, stack, bytes);
#else
  (void)saved, (void)stack, (void)bytes;
#endif
}

float ElementOf(uint32_t word, int half, bool is_half) {
  const uint32_t bits = half == 0 ? word & 0xFFFFU : word >> 16;
  return is_half ? cuda::HalfToFloat(bits) : cuda::FloatOf(bits << 16);
}

}  // namespace

EmulatedBlock::EmulatedBlock(int64_t index, int64_t blocks, int threads,
                             const std::function<void(EmulatedBlock&)>& body)
    : index_(index),
      blocks_(blocks),
      threads_(threads),
      body_(body),
      fibers_(static_cast<size_t>(threads)),
      shuffled_(2 * static_cast<size_t>(threads)) {
  for (Fiber& fiber : fibers_) {
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &EmulatedBlock::Enter, 0);
  }
}

void EmulatedBlock::RunGrid(int64_t blocks, int threads,
                            const std::function<void(EmulatedBlock&)>& body) {
  if (threads % 32 != 0) Fail("threads are no multiple of 32");
  for (int64_t index = 0; index < blocks; ++index) {
    EmulatedBlock block(index, blocks, threads, body);
    running = &block;
    block.Run();
  }
}

void EmulatedBlock::Enter() {
  EmulatedBlock& block = *running;
  FinishSwitch(nullptr, &block.scheduler_stack_, &block.scheduler_stack_size_);
  block.body_(block);
  block.fibers_[static_cast<size_t>(block.current_)].at = At::kEnd;
  StartSwitch(nullptr, block.scheduler_stack_, block.scheduler_stack_size_);
  setcontext(&block.scheduler_);
}

void EmulatedBlock::Resume(int thread) {
  Fiber& fiber = fibers_[static_cast<size_t>(thread)];
  current_ = thread;
  StartSwitch(&scheduler_sanitizer_, fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler_, &fiber.context);
  FinishSwitch(scheduler_sanitizer_, nullptr, nullptr);
}

void EmulatedBlock::Meet(At at) {
  Fiber& fiber = fibers_[static_cast<size_t>(current_)];
  fiber.at = at;
  StartSwitch(&fiber.sanitizer_stack, scheduler_stack_, scheduler_stack_size_);
  swapcontext(&fiber.context, &scheduler_);
  FinishSwitch(fiber.sanitizer_stack, &scheduler_stack_, &scheduler_stack_size_);
}

void EmulatedBlock::RunWarp(int warp) {
  Fiber* const lanes = &fibers_[static_cast<size_t>(warp) * 32];
  do {
    for (int lane = 0; lane < 32; ++lane) Resume(warp * 32 + lane);
    for (int lane = 1; lane < 32; ++lane) {
      if (lanes[lane].at != lanes[0].at) Fail("lanes of a warp do different things");
    }
  } while (lanes[0].at == At::kWarp);
}

void EmulatedBlock::Run() {
  do {
    for (int i = 0; i < warps(); ++i) RunWarp(index_ % 2 == 0 ? i : warps() - 1 - i);
    for (const Fiber& fiber : fibers_) {
      if (fiber.at != fibers_[0].at) Fail("a warp ends where another waits");
    }
  } while (fibers_[0].at != At::kEnd);
}

float EmulatedBlock::ShuffleXor(float value, int mask) {
  const uint64_t meeting = fibers_[static_cast<size_t>(current_)].meetings++;
  float* const all = &shuffled_[static_cast<size_t>(meeting % 2 * threads_ + warp() * 32)];
  all[lane()] = value;
  Meet(At::kWarp);
  return all[lane() ^ mask];
}

void EmulatedBlock::Multiplied() {
  Meet(At::kWarp);
  // The first lane to go on does it for all.
  Fiber* const lanes = &fibers_[static_cast<size_t>(warp()) * 32];
  if (lane() == 0) MultiplyAll(lanes);
}

void EmulatedBlock::MultiplyAll(Fiber* lanes) {
  for (size_t i = 0; i < lanes[0].products.size(); ++i) {
    double a[16][16];
    double b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane].products.size() != lanes[0].products.size()) {
        Fail("lanes multiply more or less often than others");
      }
      const Product& product = lanes[lane].products[i];
      for (int half = 0; half < 2; ++half) {
        for (int reg = 0; reg < 4; ++reg) {
          a[cuda::FragmentATokens(lane, reg)][cuda::FragmentAElement(lane, reg, half)] =
              ElementOf(product.a[reg], half, product.half);
        }
        for (int reg = 0; reg < 2; ++reg) {
          b[cuda::FragmentBElement(lane, reg, half)][cuda::FragmentBRow(lane)] =
              ElementOf(product.b[reg], half, product.half);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int reg = 0; reg < 4; ++reg) {
        float& c = lanes[lane].products[i].c[reg];
        double sum = c;
        for (int k = 0; k < 16; ++k) {
          sum += a[cuda::FragmentCToken(lane, reg)][k] * b[k][cuda::FragmentCRow(lane, reg)];
        }
        c = static_cast<float>(sum);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) lanes[lane].products.clear();
}

cuda::Words4 EmulatedBlock::Once16(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) Fail("a load of 16 bytes is not aligned");
  cuda::Words4 words;
  std::memcpy(&words, from, sizeof(words));
  return words;
}

void EmulatedBlock::Once8(const void* from, uint32_t* two) {
  if (reinterpret_cast<uintptr_t>(from) % 8 != 0) Fail("a load of 8 bytes is not aligned");
  std::memcpy(two, from, 8);
}

}  // namespace structkv::testing
