#include "kernels/cpu/scratch_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace structkv::cpu {
namespace {

constexpr size_t kMaxIdle = 16;
constexpr size_t kHugePageBytes = size_t{2} << 20;

std::align_val_t AlignmentOf(size_t size) {
  return std::align_val_t{size >= kHugePageBytes ? kHugePageBytes : 64};
}

void* Allocate(size_t size) {
  void* data = ::operator new(std::max<size_t>(size, 1), AlignmentOf(size));
#ifdef MADV_HUGEPAGE
  // Advice alone. What is this large is walked over from end to end, and small pages cost each
  // walk.
  if (size >= kHugePageBytes) madvise(data, size / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE);
#endif
  return data;
}

void Free(void* data, size_t size) { ::operator delete(data, AlignmentOf(size)); }

}  // namespace

ScratchPool::~ScratchPool() {
  for (const Idle& idle : idle_) Free(idle.data, idle.size);
}

ScratchPool::Block ScratchPool::Acquire(size_t size) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The smallest that is large enough, and not so large that it is wasted.
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      if (it->size < size || it->size / 4 > size) continue;
      if (best == idle_.end() || it->size < best->size) best = it;
    }
    if (best != idle_.end()) {
      const Idle found = *best;
      idle_.erase(best);
      idle_bytes_ -= found.size;
      return Block(this, found.data, found.size);
    }
  }
  return Block(this, Allocate(size), size);
}

void ScratchPool::Return(void* data, size_t size) {
  std::vector<Idle> freed;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back({data, size});
    idle_bytes_ += size;
    while (idle_bytes_ > idle_limit_ || idle_.size() > kMaxIdle) {  // the oldest go
      freed.push_back(idle_.front());
      idle_bytes_ -= idle_.front().size;
      idle_.erase(idle_.begin());
    }
  }
  for (const Idle& idle : freed) Free(idle.data, idle.size);
}

}  // namespace structkv::cpu
