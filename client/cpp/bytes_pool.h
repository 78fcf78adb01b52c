// Reused memory for results.
#pragma once

#include <cstddef>
#include <memory>

#include "structkv/bytes.h"

namespace structkv::client::internal {

// Thread-safe. What it gave may outlive it.
class BytesPool {
 public:
  // Keeps at most `idle_limit` bytes of returned memory.
  explicit BytesPool(size_t idle_limit);
  ~BytesPool();

  // `size` bytes, aligned to 64, contents unspecified.
  Bytes Acquire(size_t size);

  size_t idle_bytes() const;

 private:
  struct Core;
  std::shared_ptr<Core> core_;
};

}  // namespace structkv::client::internal
