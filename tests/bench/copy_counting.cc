// Linked into a program, it has the program count what it copies, and what its libraries do: the C
// library's functions that copy memory, and those that take bytes to a socket and from one, are
// these, and so is StreamingCopy, whose loop is none of them. What kernels write as their result
// (rows that stay) is no copy, and neither is a copy of a constant few bytes, which compilers write
// out. Slower than the real ones: for counting, not for timing.
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#include "kernels/streaming_copy.h"
#include "tests/bench/copy_count.h"

namespace {

structkv::bench::CopyPage* page = nullptr;

// Before other constructors and threads; what is copied before it is not counted.
__attribute__((constructor(101))) void Begin() { page = structkv::bench::MapCopyPage(); }

void Copy(void* to, const void* from, size_t size) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

void CopyBackwards(void* to, const void* from, size_t size) {
  void* last_to = static_cast<char*>(to) + size - 1;
  const void* last_from = static_cast<const char*>(from) + size - 1;
  asm volatile("std\n\trep movsb\n\tcld" : "+D"(last_to), "+S"(last_from), "+c"(size) : : "memory");
}

void Count(std::atomic<uint64_t> structkv::bench::CopyPage::*counter, int64_t bytes) {
  if (page != nullptr && bytes > 0) {
    (page->*counter).fetch_add(static_cast<uint64_t>(bytes), std::memory_order_relaxed);
  }
}

using Page = structkv::bench::CopyPage;

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void* memcpy(void* to, const void* from,
                                                    size_t size) noexcept {
  Count(&Page::copied, static_cast<int64_t>(size));
  Copy(to, from, size);
  return to;
}

__attribute__((visibility("default"))) void* memmove(void* to, const void* from,
                                                     size_t size) noexcept {
  Count(&Page::copied, static_cast<int64_t>(size));
  const auto distance = reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from);
  if (distance < size && size > 0) {
    CopyBackwards(to, from, size);
  } else {
    Copy(to, from, size);
  }
  return to;
}

// What the two are in libraries that were built with _FORTIFY_SOURCE.
__attribute__((visibility("default"))) void* __memcpy_chk(void* to, const void* from, size_t size,
                                                          size_t room) noexcept {
  if (size > room) __builtin_trap();
  return memcpy(to, from, size);
}

__attribute__((visibility("default"))) void* __memmove_chk(void* to, const void* from, size_t size,
                                                           size_t room) noexcept {
  if (size > room) __builtin_trap();
  return memmove(to, from, size);
}

__attribute__((visibility("default"))) ssize_t sendmsg(int socket, const msghdr* message,
                                                       int flags) {
  const int64_t bytes = syscall(SYS_sendmsg, socket, message, flags);
  Count(&Page::sent, bytes);
  return bytes;
}

__attribute__((visibility("default"))) ssize_t recvmsg(int socket, msghdr* message, int flags) {
  const int64_t bytes = syscall(SYS_recvmsg, socket, message, flags);
  Count(&Page::received, bytes);
  return bytes;
}

__attribute__((visibility("default"))) ssize_t send(int socket, const void* data, size_t size,
                                                    int flags) {
  const int64_t bytes = syscall(SYS_sendto, socket, data, size, flags, nullptr, 0);
  Count(&Page::sent, bytes);
  return bytes;
}

__attribute__((visibility("default"))) ssize_t recv(int socket, void* data, size_t size,
                                                    int flags) {
  const int64_t bytes = syscall(SYS_recvfrom, socket, data, size, flags, nullptr, nullptr);
  Count(&Page::received, bytes);
  return bytes;
}

}  // extern "C"

namespace structkv {

void StreamingCopy(std::byte* to, const std::byte* from, size_t size) { memcpy(to, from, size); }

void FinishStreamingCopies() {}

}  // namespace structkv
