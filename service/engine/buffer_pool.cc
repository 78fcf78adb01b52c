#include "service/engine/buffer_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <utility>

namespace structkv::engine {
namespace {

// Below this a transparent huge page cannot back anything.
constexpr size_t kHugePageBytes = size_t{2} << 20;

size_t PageBytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

size_t RoundUpToPages(size_t size) {
  const size_t page = PageBytes();
  return (size + page - 1) / page * page;
}

std::byte* MapPages(size_t size) {
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    std::fprintf(stderr, "structkv: mapping %zu bytes for a buffer failed\n", size);
    std::abort();
  }
  // Advice alone: without huge pages the memory is slower to touch first, and as good afterwards.
  if (size >= kHugePageBytes) madvise(data, size, MADV_HUGEPAGE);
  return static_cast<std::byte*>(data);
}

}  // namespace

// What buffers and their pool share; lives until the last of them is gone.
struct Buffer::Core {
  struct Run {
    std::byte* data = nullptr;
    size_t size = 0;
    bool pinned = false;
  };
  using Runs = std::list<Run>;

  Core(size_t idle_limit, HostPinning with)
      : idle_limit_bytes(idle_limit), pinning(std::move(with)) {}
  ~Core() { Unmap(&idle); }

  void Unmap(Runs* runs) {
    for (Run& run : *runs) {
      Unpin(&run);
      munmap(run.data, run.size);
    }
  }

  // Whole pages that are in use, not under the mutex: it takes milliseconds.
  void Pin(Run* run) {
    if (run->pinned || !pinning.pin || static_cast<int64_t>(run->size) < pinning.least_bytes ||
        !pinning.pin(run->data, static_cast<int64_t>(run->size))) {
      return;
    }
    run->pinned = true;
    pinned_bytes += run->size;
  }
  void Unpin(Run* run) {
    if (!run->pinned) return;
    pinning.unpin(run->data);
    run->pinned = false;
    pinned_bytes -= run->size;
  }

  // A run of `size` bytes (whole pages) or slightly more.
  Run Take(size_t size) {
    Runs dropped;
    {
      const std::lock_guard lock(mutex);
      auto fit = by_size.lower_bound(size);
      // Of several the one that came back last: it may still be in the cache.
      if (fit != by_size.end()) fit = std::prev(by_size.upper_bound(fit->first));
      // Past this a buffer would hold much more memory than its user has reserved.
      const size_t largest = size + std::max(size / 8, 2 * PageBytes());
      if (fit != by_size.end() && fit->first <= largest) {
        const Run run = *fit->second;
        idle.erase(fit->second);
        by_size.erase(fit);
        idle_bytes -= run.size;
        CountUse(run.size);
        return run;
      }
      CountUse(size);
      dropped = Surplus();
    }
    Unmap(&dropped);  // before more is mapped
    return {MapPages(size), size};
  }

  void Return(Run run) {
    Runs dropped;
    {
      const std::lock_guard lock(mutex);
      in_use_bytes -= run.size;
      idle.push_back(run);
      by_size.emplace(run.size, std::prev(idle.end()));
      idle_bytes += run.size;
      dropped = Surplus();
    }
    Unmap(&dropped);
  }

  // Keeps the first bytes, whole pages, of a run that is in use. They are not pinned any more.
  void Cut(Run* run, size_t size) {
    Unpin(run);
    const size_t cut = run->size - size;
    munmap(run->data + size, cut);
    run->size = size;
    const std::lock_guard lock(mutex);
    in_use_bytes -= cut;
  }

  void ChangeAllowance(size_t add, size_t remove) {
    Runs dropped;
    {
      const std::lock_guard lock(mutex);
      allowed_bytes = allowed_bytes + add - remove;
      dropped = Surplus();
    }
    Unmap(&dropped);
  }

  // Under the mutex:

  // Takes out what may not be kept: the run that nobody wanted for the longest time first.
  Runs Surplus() {
    Runs dropped;
    while (idle_bytes > idle_limit_bytes && in_use_bytes + idle_bytes > allowed_bytes) {
      auto oldest = idle.begin();
      auto [entry, end] = by_size.equal_range(oldest->size);
      while (entry != end && entry->second != oldest) ++entry;
      by_size.erase(entry);
      idle_bytes -= oldest->size;
      dropped.splice(dropped.end(), idle, oldest);
    }
    return dropped;
  }

  void CountUse(size_t size) {
    in_use_bytes += size;
    peak_in_use_bytes = std::max(peak_in_use_bytes, in_use_bytes);
  }

  const size_t idle_limit_bytes;
  const HostPinning pinning;
  std::atomic<size_t> pinned_bytes = 0;
  mutable std::mutex mutex;
  Runs idle;  // oldest return first
  std::multimap<size_t, Runs::iterator> by_size;
  size_t allowed_bytes = 0;
  size_t idle_bytes = 0;
  size_t in_use_bytes = 0;
  size_t peak_in_use_bytes = 0;
};

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this == &other) return *this;
  Reset();
  core_ = std::move(other.core_);
  owner_ = std::move(other.owner_);
  data_ = std::exchange(other.data_, nullptr);
  size_ = std::exchange(other.size_, 0);
  capacity_ = std::exchange(other.capacity_, 0);
  pinned_ = std::exchange(other.pinned_, false);
  return *this;
}

Buffer Buffer::Borrowed(void* data, size_t size) {
  Buffer buffer;
  buffer.data_ = static_cast<std::byte*>(data);
  buffer.size_ = size;
  return buffer;
}

Buffer Buffer::Lent(void* data, size_t size, std::shared_ptr<const void> owner) {
  Buffer buffer = Borrowed(data, size);
  buffer.owner_ = std::move(owner);
  return buffer;
}

void Buffer::Reset() {
  if (core_ != nullptr) core_->Return({data_, capacity_, pinned_});
  core_.reset();
  owner_.reset();
  data_ = nullptr;
  size_ = 0;
  capacity_ = 0;
  pinned_ = false;
}

void Buffer::Trim() {
  const size_t kept = RoundUpToPages(size_);
  if (core_ == nullptr || kept == 0 || kept >= capacity_) return;
  Core::Run run = {data_, capacity_, pinned_};
  core_->Cut(&run, kept);
  capacity_ = run.size;
  pinned_ = run.pinned;
}

BufferAllowance& BufferAllowance::operator=(BufferAllowance&& other) noexcept {
  if (this == &other) return *this;
  Release();
  core_ = std::move(other.core_);
  bytes_ = std::exchange(other.bytes_, 0);
  return *this;
}

void BufferAllowance::Release() {
  if (core_ != nullptr) core_->ChangeAllowance(0, bytes_);
  core_.reset();
  bytes_ = 0;
}

BufferPool::BufferPool(size_t idle_limit_bytes, HostPinning pinning)
    : core_(std::make_shared<Buffer::Core>(idle_limit_bytes, std::move(pinning))) {}

Buffer BufferPool::Acquire(size_t size) { return Acquire(size, /*pinned=*/false); }
Buffer BufferPool::AcquirePinned(size_t size) { return Acquire(size, /*pinned=*/true); }

Buffer BufferPool::Acquire(size_t size, bool pinned) {
  Buffer buffer;
  if (size == 0) return buffer;
  Buffer::Core::Run run = core_->Take(RoundUpToPages(size));
  if (pinned) core_->Pin(&run);
  buffer.core_ = core_;
  buffer.data_ = run.data;
  buffer.size_ = size;
  buffer.capacity_ = run.size;
  buffer.pinned_ = run.pinned;
  return buffer;
}

BufferAllowance BufferPool::Allow(size_t bytes) {
  core_->ChangeAllowance(bytes, 0);
  BufferAllowance allowance;
  allowance.core_ = core_;
  allowance.bytes_ = bytes;
  return allowance;
}

size_t BufferPool::in_use_bytes() const {
  const std::lock_guard lock(core_->mutex);
  return core_->in_use_bytes;
}

size_t BufferPool::idle_bytes() const {
  const std::lock_guard lock(core_->mutex);
  return core_->idle_bytes;
}

size_t BufferPool::peak_in_use_bytes() const {
  const std::lock_guard lock(core_->mutex);
  return core_->peak_in_use_bytes;
}

size_t BufferPool::pinned_bytes() const { return core_->pinned_bytes; }

}  // namespace structkv::engine
