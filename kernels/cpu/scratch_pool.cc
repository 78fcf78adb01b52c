#include "kernels/cpu/scratch_pool.h"

#include <algorithm>
#include <new>

namespace structkv::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr size_t kMaxIdle = 16;

}  // namespace

ScratchPool::~ScratchPool() {
  for (const Idle& idle : idle_) ::operator delete(idle.data, kAlignment);
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
  return Block(this, ::operator new(std::max<size_t>(size, 1), kAlignment), size);
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
  for (const Idle& idle : freed) ::operator delete(idle.data, kAlignment);
}

}  // namespace structkv::cpu
