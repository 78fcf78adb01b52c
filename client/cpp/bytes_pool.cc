#include "client/cpp/bytes_pool.h"

#include <cstdlib>
#include <map>
#include <new>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace structkv::client::internal {
namespace {

constexpr size_t kAlignment = 64;

struct Free {
  void operator()(std::byte* data) const { std::free(data); }
};
using Block = std::unique_ptr<std::byte, Free>;

}  // namespace

struct BytesPool::Core {
  explicit Core(size_t limit) : idle_limit(limit) {}

  const size_t idle_limit;
  mutable absl::Mutex mutex;
  std::multimap<size_t, Block> idle ABSL_GUARDED_BY(mutex);
  size_t idle_bytes ABSL_GUARDED_BY(mutex) = 0;

  // A block of at least `capacity`, not of more than twice that; null: none.
  Block Take(size_t* capacity) {
    absl::MutexLock lock(&mutex);
    auto it = idle.lower_bound(*capacity);
    if (it == idle.end() || it->first > 2 * *capacity) return nullptr;
    *capacity = it->first;
    Block block = std::move(it->second);
    idle.erase(it);
    idle_bytes -= *capacity;
    return block;
  }

  void Return(Block block, size_t capacity) {
    absl::MutexLock lock(&mutex);
    if (capacity > idle_limit - idle_bytes) return;
    idle_bytes += capacity;
    idle.emplace(capacity, std::move(block));
  }
};

BytesPool::BytesPool(size_t idle_limit) : core_(std::make_shared<Core>(idle_limit)) {}
BytesPool::~BytesPool() = default;

Bytes BytesPool::Acquire(size_t size) {
  if (size == 0) return {};
  size_t capacity = (size + kAlignment - 1) / kAlignment * kAlignment;
  Block block = core_->Take(&capacity);
  if (block == nullptr) {
    block.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, capacity)));
    if (block == nullptr) throw std::bad_alloc();
  }
  std::byte* data = block.release();
  std::shared_ptr<const void> owner(
      static_cast<const void*>(data),
      [core = core_, data, capacity](const void*) { core->Return(Block(data), capacity); });
  return {data, size, std::move(owner)};
}

size_t BytesPool::idle_bytes() const {
  absl::MutexLock lock(&core_->mutex);
  return core_->idle_bytes;
}

}  // namespace structkv::client::internal
