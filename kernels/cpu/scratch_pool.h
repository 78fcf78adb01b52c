// Scratch memory that calls reuse: the first touch of fresh pages costs more than the arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace structkv::cpu {

// Thread-safe.
class ScratchPool {
 public:
  // 64-byte aligned, contents unspecified. Goes back to the pool when destroyed; the pool must
  // outlive it.
  class Block {
   public:
    Block(ScratchPool* pool, void* data, size_t size) : pool_(pool), data_(data), size_(size) {}
    ~Block() { pool_->Return(data_, size_); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    std::byte* data() const { return static_cast<std::byte*>(data_); }

   private:
    ScratchPool* const pool_;
    void* const data_;
    const size_t size_;
  };

  // Keeps at most `idle_limit_bytes` of returned memory.
  explicit ScratchPool(size_t idle_limit_bytes) : idle_limit_(idle_limit_bytes) {}
  ~ScratchPool();
  ScratchPool(const ScratchPool&) = delete;
  ScratchPool& operator=(const ScratchPool&) = delete;

  // At least `size` bytes.
  Block Acquire(size_t size);

 private:
  struct Idle {
    void* data;
    size_t size;
  };

  void Return(void* data, size_t size);

  const size_t idle_limit_;
  std::mutex mutex_;
  std::vector<Idle> idle_;  // guarded by mutex_
  size_t idle_bytes_ = 0;   // guarded by mutex_
};

}  // namespace structkv::cpu
