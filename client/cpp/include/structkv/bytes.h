// Memory that results are delivered in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/types/span.h"

namespace structkv::client {

// A run of bytes and what keeps them alive. Copies share the same bytes. Buffers that the library
// allocated go back to the client's pool when the last copy dies, and may outlive the client.
class Bytes {
 public:
  Bytes() = default;
  // `owner` keeps `data` alive; null: the memory outlives every copy.
  Bytes(std::byte* data, size_t size, std::shared_ptr<const void> owner)
      : data_(data), size_(size), owner_(std::move(owner)) {}

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  absl::Span<std::byte> span() const { return {data_, size_}; }
  // The bytes as elements of `T`; they are aligned for it where the library allocated them.
  template <typename T>
  absl::Span<const T> as() const {
    return {reinterpret_cast<const T*>(data_), size_ / sizeof(T)};
  }
  const std::shared_ptr<const void>& owner() const { return owner_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  std::shared_ptr<const void> owner_;
};

}  // namespace structkv::client
