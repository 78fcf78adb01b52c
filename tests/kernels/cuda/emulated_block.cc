#include "tests/kernels/cuda/emulated_block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "kernels/cuda/fragments.h"

#if defined(__SANITIZE_ADDRESS__)
#define STRUCTKV_FIBERS_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define STRUCTKV_FIBERS_SANITIZED 1
#endif
#endif
#ifdef STRUCTKV_FIBERS_SANITIZED
#include <sanitizer/asan_interface.h>
#endif

namespace structkv::testing {
namespace {

constexpr size_t kStackBytes = size_t{64} << 10;

// makecontext takes no pointer; one cluster runs at a time on a thread.
thread_local EmulatedCluster* running = nullptr;

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

// A fiber ends within its last frames, which the sanitizer then still takes for somebody's.
void Forget(const void* stack, size_t bytes) {
#ifdef STRUCTKV_FIBERS_SANITIZED
  __asan_unpoison_memory_region(stack, bytes);
#else
  (void)stack, (void)bytes;
#endif
}

float ElementOf(uint32_t word, int half, bool is_half) {
  const uint32_t bits = half == 0 ? word & 0xFFFFU : word >> 16;
  return is_half ? cuda::HalfToFloat(bits) : cuda::FloatOf(bits << 16);
}

}  // namespace

int EmulatedBlock::threads() const { return cluster_->threads_; }
int EmulatedBlock::ranks() const { return cluster_->ranks_; }
void EmulatedBlock::Sync() {
  cluster_->Meet(this, &cluster_->blocks_[static_cast<size_t>(rank_)],
                 EmulatedCluster::Operation::kSync);
}
void EmulatedBlock::SyncCluster() {
  cluster_->Meet(this, &cluster_->cluster_, EmulatedCluster::Operation::kSyncCluster);
}
void EmulatedBlock::Multiplied() {
  cluster_->Meet(this, cluster_->WarpOf(*this), EmulatedCluster::Operation::kMultiplied);
}

uint32_t EmulatedBlock::Ballot(bool predicate) {
  const uint64_t* all = Exchange(predicate ? 1 : 0);
  uint32_t lanes = 0;
  for (int l = 0; l < kLanes; ++l) lanes |= static_cast<uint32_t>(all[l]) << l;
  return lanes;
}

uint32_t EmulatedBlock::SumWarp(uint32_t value) {
  const uint64_t* all = Exchange(value);
  return static_cast<uint32_t>(std::accumulate(all, all + kLanes, uint64_t{0}));
}

const uint64_t* EmulatedBlock::Exchange(uint64_t value) {
  // Two places in turns: a lane can be one exchange ahead of the others, not two.
  const size_t turn = exchanges_++ % 2 * cluster_->all_.size();
  uint64_t* all =
      &cluster_->exchanged_[turn + static_cast<size_t>(rank_ * threads() + thread_ - lane())];
  all[lane()] = value;
  cluster_->Meet(this, cluster_->WarpOf(*this), EmulatedCluster::Operation::kExchange);
  return all;
}

const std::byte* EmulatedBlock::PeerBytes(const std::byte* shared, int of_rank) const {
  return cluster_->Shared(of_rank) + (shared - cluster_->Shared(rank_));
}

void EmulatedBlock::Load(const void* from, size_t bytes, void* to) {
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) Fail("a wide load is not aligned");
  std::memcpy(to, from, bytes);
}

EmulatedCluster::EmulatedCluster(int ranks, int threads, size_t shared_bytes,
                                 std::mt19937_64& random, const Body& body)
    : ranks_(ranks),
      threads_(threads),
      shared_bytes_((shared_bytes / sizeof(std::max_align_t) + 1) * sizeof(std::max_align_t)),
      random_(random),
      body_(body),
      all_(static_cast<size_t>(ranks * threads)),
      warps_(all_.size() / EmulatedBlock::kLanes),
      blocks_(static_cast<size_t>(ranks)),
      exchanged_(2 * all_.size()),
      shared_(static_cast<size_t>(ranks) * shared_bytes_ / sizeof(std::max_align_t)) {
  if (threads % EmulatedBlock::kLanes != 0) Fail("threads are no multiple of 32");
  for (EmulatedBlock& thread : all_) {
    thread.stack_ = std::make_unique_for_overwrite<char[]>(kStackBytes);
  }
  for (Meeting& warp : warps_) warp.expected = EmulatedBlock::kLanes;
  for (Meeting& block : blocks_) block.expected = threads;
  cluster_.expected = ranks * threads;
}

std::byte* EmulatedCluster::Shared(int rank) {
  return reinterpret_cast<std::byte*>(shared_.data()) + static_cast<size_t>(rank) * shared_bytes_;
}

EmulatedCluster::Meeting* EmulatedCluster::WarpOf(const EmulatedBlock& thread) {
  return &warps_[static_cast<size_t>((thread.rank_ * threads_ + thread.thread_) /
                                     EmulatedBlock::kLanes)];
}

void EmulatedCluster::RunCluster(int ranks, int threads, size_t shared_bytes,
                                 std::mt19937_64& random, const Body& body) {
  EmulatedCluster(ranks, threads, shared_bytes, random, body).Run(0, 1);
}

void EmulatedCluster::RunGrid(int64_t blocks, int threads, size_t shared_bytes,
                              std::mt19937_64& random, const Body& body) {
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  EmulatedCluster block(1, threads, shared_bytes, random, body);
  for (const int64_t index : order) block.Run(index, blocks);
}

void EmulatedCluster::Run(int64_t index, int64_t blocks) {
  std::memset(static_cast<void*>(shared_.data()), 0xFF, shared_.size() * sizeof(shared_[0]));
  running = this;
  for (size_t i = 0; i < all_.size(); ++i) {
    EmulatedBlock& thread = all_[i];
    thread.cluster_ = this;
    thread.thread_ = static_cast<int>(i) % threads_;
    thread.rank_ = static_cast<int>(i) / threads_;
    thread.index_ = index;
    thread.blocks_ = blocks;
    thread.exchanges_ = 0;
    thread.done_ = false;
    Prepare(&thread);
    ready_.push_back(&thread);
  }
  // The last to end comes back here, or one that waits where no other can go on.
  Switch(&scheduler_, &scheduler_sanitizer_);
  FinishSwitch(scheduler_sanitizer_, nullptr, nullptr);
  for (const EmulatedBlock& thread : all_) {
    if (!thread.done_) Fail("a thread waits for ever");
  }
}

void EmulatedCluster::Prepare(EmulatedBlock* thread) {
  Forget(thread->stack_.get(), kStackBytes);
  getcontext(&thread->context_);
  thread->context_.uc_stack.ss_sp = thread->stack_.get();
  thread->context_.uc_stack.ss_size = kStackBytes;
  thread->context_.uc_link = nullptr;
  makecontext(&thread->context_, &EmulatedCluster::Enter, 0);
}

void EmulatedCluster::Switch(ucontext_t* from, void** save) {
  ucontext_t* to = &scheduler_;
  if (ready_.empty()) {
    StartSwitch(save, scheduler_stack_, scheduler_stack_size_);
  } else {
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    current_ = ready_.back();
    ready_.pop_back();
    StartSwitch(save, current_->stack_.get(), kStackBytes);
    to = &current_->context_;
  }
  if (from == nullptr) setcontext(to);
  swapcontext(from, to);
}

void EmulatedCluster::Enter() {
  EmulatedCluster& cluster = *running;
  // The first comes from the scheduler, the others from each other.
  const bool first = cluster.scheduler_stack_ == nullptr;
  FinishSwitch(nullptr, first ? &cluster.scheduler_stack_ : nullptr,
               first ? &cluster.scheduler_stack_size_ : nullptr);
  EmulatedBlock& thread = *cluster.current_;
  cluster.body_(thread, cluster.Shared(thread.rank_));
  thread.done_ = true;
  cluster.Switch(nullptr, nullptr);
}

void EmulatedCluster::Meet(EmulatedBlock* thread, Meeting* meeting, Operation operation) {
  if (meeting->waiting.empty()) meeting->operation = operation;
  if (meeting->operation != operation) Fail("lanes of a warp do different things");
  meeting->waiting.push_back(thread);
  if (static_cast<int>(meeting->waiting.size()) == meeting->expected) {
    if (operation == Operation::kMultiplied) MultiplyAll(meeting->waiting);
    ready_.insert(ready_.end(), meeting->waiting.begin(), meeting->waiting.end());
    meeting->waiting.clear();
  }
  Switch(&thread->context_, &thread->sanitizer_stack_);
  FinishSwitch(thread->sanitizer_stack_, nullptr, nullptr);
}

// Does all that the lanes of a warp wait for.
void EmulatedCluster::MultiplyAll(const std::vector<EmulatedBlock*>& lanes) {
  for (size_t i = 0; i < lanes[0]->products_.size(); ++i) {
    double a[cuda::kBlockTokens][16];
    double b[16][cuda::kTileRows];
    for (const EmulatedBlock* each : lanes) {
      if (each->products_.size() != lanes[0]->products_.size()) {
        Fail("lanes multiply more or less often than others");
      }
      const EmulatedBlock::Product& product = each->products_[i];
      for (int half = 0; half < 2; ++half) {
        for (int reg = 0; reg < 4; ++reg) {
          a[cuda::FragmentATokens(each->lane(), reg)][cuda::FragmentAElement(
              each->lane(), reg, half)] = ElementOf(product.a[reg], half, product.half);
        }
        for (int reg = 0; reg < 2; ++reg) {
          b[cuda::FragmentBElement(each->lane(), reg, half)][cuda::FragmentBRow(each->lane())] =
              ElementOf(product.b[reg], half, product.half);
        }
      }
    }
    for (const EmulatedBlock* each : lanes) {
      for (int reg = 0; reg < 4; ++reg) {
        float& c = each->products_[i].c[reg];
        double sum = c;
        for (int k = 0; k < 16; ++k) {
          sum += a[cuda::FragmentCToken(each->lane(), reg)][k] *
                 b[k][cuda::FragmentCRow(each->lane(), reg)];
        }
        c = static_cast<float>(sum);
      }
    }
  }
  for (EmulatedBlock* each : lanes) each->products_.clear();
}

}  // namespace structkv::testing
