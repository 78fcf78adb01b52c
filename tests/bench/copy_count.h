// Bytes that processes have copied, as they count them themselves where they are built to
// (copy_counting.cc): one page of counters for all of them, in a file that a variable names.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>

namespace structkv::bench {

// The environment variable: a file of at least a CopyPage, zeros at first.
inline constexpr char kCopyCountFile[] = "STRUCTKV_TEST_COPY_COUNT";

struct CopyPage {
  std::atomic<uint64_t> copied;    // from memory to memory of a process
  std::atomic<uint64_t> sent;      // into sockets
  std::atomic<uint64_t> received;  // out of sockets
};

// Of a time: differences of the counters.
struct Copies {
  uint64_t copied = 0;
  uint64_t sent = 0;
  uint64_t received = 0;

  uint64_t all() const { return copied + sent + received; }
  Copies& operator+=(const Copies& more);
};
Copies operator-(const Copies& now, const Copies& before);

// What the processes of the page have counted so far; nullopt where the variable is not set.
std::optional<Copies> CountedCopies();

// Copies during its life are added to `*total`.
class CopyMeter {
 public:
  explicit CopyMeter(std::optional<Copies>* total) : total_(total), before_(CountedCopies()) {}
  ~CopyMeter();
  CopyMeter(const CopyMeter&) = delete;
  CopyMeter& operator=(const CopyMeter&) = delete;

 private:
  std::optional<Copies>* const total_;
  const std::optional<Copies> before_;
};

// The page of the variable's file, which stays mapped; null where it is not set or cannot be
// mapped. Calls no function that copies.
CopyPage* MapCopyPage();

}  // namespace structkv::bench
