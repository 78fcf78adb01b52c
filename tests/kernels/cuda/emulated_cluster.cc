#include "tests/kernels/cuda/emulated_cluster.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace structkv::testing {
namespace {

constexpr size_t kStackBytes = size_t{32} << 10;

// makecontext takes no pointer; one cluster runs at a time on a thread.
thread_local EmulatedCluster* running = nullptr;

void StartSwitch(void** save, const void* stack, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(save, stack, bytes);
#else
  (void)save, (void)stack, (void)bytes;
#endif
}

void FinishSwitch(void* saved, const void** stack, size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(saved, stack, bytes);
#else
  (void)saved, (void)stack, (void)bytes;
#endif
}

}  // namespace

int EmulatedThread::threads() const { return cluster_->threads_; }
int EmulatedThread::ranks() const { return cluster_->ranks_; }
void EmulatedThread::Sync() { cluster_->Meet(this, &cluster_->blocks_[rank_]); }
void EmulatedThread::SyncCluster() { cluster_->Meet(this, &cluster_->cluster_); }

uint32_t EmulatedThread::Ballot(bool predicate) {
  const uint64_t* all = Exchange(predicate ? 1 : 0);
  uint32_t lanes = 0;
  for (int l = 0; l < kLanes; ++l) lanes |= static_cast<uint32_t>(all[l]) << l;
  return lanes;
}

uint32_t EmulatedThread::SumWarp(uint32_t value) {
  const uint64_t* all = Exchange(value);
  return static_cast<uint32_t>(std::accumulate(all, all + kLanes, uint64_t{0}));
}

const uint64_t* EmulatedThread::Exchange(uint64_t value) {
  // Two places in turns: a lane can be one exchange ahead of the others, not two.
  const size_t turn = exchanges_++ % 2 * cluster_->all_.size();
  uint64_t* all =
      &cluster_->exchanged_[turn + static_cast<size_t>(rank_ * threads() + thread_ - lane())];
  all[lane()] = value;
  cluster_->Meet(this, cluster_->WarpOf(*this));
  return all;
}

const std::byte* EmulatedThread::PeerBytes(const std::byte* shared, int of_rank) const {
  return cluster_->Shared(of_rank) + (shared - cluster_->Shared(rank_));
}

EmulatedCluster::EmulatedCluster(int ranks, int threads, size_t shared_bytes,
                                 std::mt19937_64& random, const Body& body)
    : ranks_(ranks),
      threads_(threads),
      shared_bytes_((shared_bytes / sizeof(std::max_align_t) + 1) * sizeof(std::max_align_t)),
      random_(random),
      body_(body),
      all_(static_cast<size_t>(ranks * threads)),
      warps_(all_.size() / EmulatedThread::kLanes),
      blocks_(static_cast<size_t>(ranks)),
      exchanged_(2 * all_.size()),
      shared_(static_cast<size_t>(ranks) * shared_bytes_ / sizeof(std::max_align_t)) {
  for (EmulatedThread& thread : all_) thread.stack_ = std::make_unique<char[]>(kStackBytes);
  for (Meeting& warp : warps_) warp.expected = EmulatedThread::kLanes;
  for (Meeting& block : blocks_) block.expected = threads;
  cluster_.expected = ranks * threads;
}

std::byte* EmulatedCluster::Shared(int rank) {
  return reinterpret_cast<std::byte*>(shared_.data()) + static_cast<size_t>(rank) * shared_bytes_;
}

EmulatedCluster::Meeting* EmulatedCluster::WarpOf(const EmulatedThread& thread) {
  return &warps_[static_cast<size_t>((thread.rank_ * threads_ + thread.thread_) /
                                     EmulatedThread::kLanes)];
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
  // What was not written is no zero.
  std::memset(static_cast<void*>(shared_.data()), 0xCD, shared_.size() * sizeof(shared_[0]));
  running = this;
  for (size_t i = 0; i < all_.size(); ++i) {
    EmulatedThread& thread = all_[i];
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
  while (!ready_.empty()) {
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    current_ = ready_.back();
    ready_.pop_back();
    StartSwitch(&scheduler_sanitizer_, current_->stack_.get(), kStackBytes);
    swapcontext(&scheduler_, &current_->context_);
    FinishSwitch(scheduler_sanitizer_, nullptr, nullptr);
  }
  for (const EmulatedThread& thread : all_) {
    if (thread.done_) continue;
    std::fprintf(stderr, "emulated cluster: thread %d of block %d waits for ever\n", thread.thread_,
                 thread.rank_);
    std::abort();
  }
}

void EmulatedCluster::Prepare(EmulatedThread* thread) {
  getcontext(&thread->context_);
  thread->context_.uc_stack.ss_sp = thread->stack_.get();
  thread->context_.uc_stack.ss_size = kStackBytes;
  thread->context_.uc_link = nullptr;
  makecontext(&thread->context_, &EmulatedCluster::Enter, 0);
}

void EmulatedCluster::Enter() {
  EmulatedCluster& cluster = *running;
  FinishSwitch(nullptr, &cluster.scheduler_stack_, &cluster.scheduler_stack_size_);
  EmulatedThread& thread = *cluster.current_;
  cluster.body_(thread, cluster.Shared(thread.rank_));
  thread.done_ = true;
  StartSwitch(nullptr, cluster.scheduler_stack_, cluster.scheduler_stack_size_);
  setcontext(&cluster.scheduler_);
}

void EmulatedCluster::Meet(EmulatedThread* thread, Meeting* meeting) {
  meeting->waiting.push_back(thread);
  if (static_cast<int>(meeting->waiting.size()) == meeting->expected) {
    ready_.insert(ready_.end(), meeting->waiting.begin(), meeting->waiting.end());
    meeting->waiting.clear();
  }
  StartSwitch(&thread->sanitizer_stack_, scheduler_stack_, scheduler_stack_size_);
  swapcontext(&thread->context_, &scheduler_);
  FinishSwitch(thread->sanitizer_stack_, &scheduler_stack_, &scheduler_stack_size_);
}

}  // namespace structkv::testing
