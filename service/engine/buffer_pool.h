// Page-aligned host buffers that are reused: the first touch of fresh pages costs more than a copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/types/span.h"
#include "kernels/host_pinning.h"

namespace structkv::engine {

class BufferPool;

// Owns a run of bytes and gives it back when destroyed. Move-only; an empty buffer has data() ==
// nullptr.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { Reset(); }

  // Refers to memory that outlives the buffer and is not freed by it.
  static Buffer Borrowed(void* data, size_t size);
  // Refers to memory that stays as long as `owner`, and that may be changed by others at any time:
  // values in it that are checked must be copied first. Not null.
  static Buffer Lent(void* data, size_t size, std::shared_ptr<const void> owner);

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  bool is_lent() const { return owner_ != nullptr; }
  // What keeps lent memory.
  const std::shared_ptr<const void>& owner() const { return owner_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  absl::Span<std::byte> span() const { return {data_, size_}; }
  // Keeps the first bytes alone, `size` of size() at most; the memory is held as before.
  void Truncate(size_t size) { size_ = size; }
  // Gives back to the system what the buffer holds behind its size(): the pool may have given it up
  // to an eighth more. For what is kept for long, and counted.
  void Trim();
  void Reset();

 private:
  friend class BufferPool;
  friend class BufferAllowance;
  struct Core;
  std::shared_ptr<Core> core_;         // null for borrowed and lent memory
  std::shared_ptr<const void> owner_;  // of lent memory
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
  bool pinned_ = false;
};

// Memory that a user of the pool has reserved: until it is dropped, returned memory is kept for
// reuse as long as the pool holds no more than all allowances together. Move-only.
class BufferAllowance {
 public:
  BufferAllowance() = default;
  BufferAllowance(BufferAllowance&& other) noexcept { *this = std::move(other); }
  BufferAllowance& operator=(BufferAllowance&& other) noexcept;
  BufferAllowance(const BufferAllowance&) = delete;
  BufferAllowance& operator=(const BufferAllowance&) = delete;
  ~BufferAllowance() { Release(); }
  // What nobody else may keep goes back to the system before this returns.
  void Release();

 private:
  friend class BufferPool;
  std::shared_ptr<Buffer::Core> core_;
  size_t bytes_ = 0;
};

// Thread-safe. Buffers and allowances may outlive the pool.
class BufferPool {
 public:
  // Keeps at most `idle_limit_bytes` of returned memory for reuse, more while there are allowances;
  // the rest goes back to the system.
  // `pinning`: the backend's (kernels/host_pinning.h).
  explicit BufferPool(size_t idle_limit_bytes, HostPinning pinning = {});

  // A prompt of a million tokens has layers far above any idle limit, and fresh pages for each of
  // them would cost more than all else that is done with it.
  BufferAllowance Allow(size_t bytes);

  // At least `size` bytes, page-aligned, contents unspecified. Does not fail short of the process's
  // end: the caller reserves from a budget first.
  Buffer Acquire(size_t size);
  // The same, pinned where the backend has that and it gains something: for tensors that come
  // or go in messages, which a device copies by itself. What is pinned stays so until it goes
  // back to the system, so that memory which is reused is pinned once.
  Buffer AcquirePinned(size_t size);

  // Whole pages of the buffers that are held now, and of those that wait for reuse.
  size_t in_use_bytes() const;
  size_t idle_bytes() const;
  // The most that in_use_bytes() ever was.
  size_t peak_in_use_bytes() const;
  // Of both, what is pinned.
  size_t pinned_bytes() const;

 private:
  Buffer Acquire(size_t size, bool pinned);

  std::shared_ptr<Buffer::Core> core_;
};

}  // namespace structkv::engine
