// Structured log lines, one write() each, to a file descriptor.
//
// A thread of its own writes them: a reader of the log that stands still, or a disk that does, must
// not hold up a stream, a probe or the end of the process.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "absl/time/time.h"

namespace structkv::rpc {

enum class LogFormat : uint8_t { kText, kJson };

// A named value of a line.
using LogField = std::pair<std::string_view, std::variant<int64_t, std::string_view>>;

// What stands for a value that is not there.
inline std::string_view OrDash(std::string_view text) { return text.empty() ? "-" : text; }

// Thread-safe. A line that cannot be written (a full disk, a closed pipe), or that would have to
// wait behind kMaxWaitingBytes of others, is dropped and counted.
class Log {
 public:
  static constexpr size_t kMaxWaitingBytes = size_t{1} << 20;

  // Does not own `fd`, which must stay open until Flush() has returned true.
  explicit Log(LogFormat format, int fd = 2);
  // Flushes for a second at most. A write() that hangs is left behind.
  ~Log();
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;

  // Text: "2026-01-02T03:04:05.678Z event key=value ..."; JSON: one object with "time" and "event".
  // Never waits.
  void Write(std::string_view event, std::initializer_list<LogField> fields);
  // Waits until all lines so far are written or dropped; false where that takes longer than
  // `limit`.
  bool Flush(absl::Duration limit);

  // Whether a line is wanted at the end of each stream; whoever writes those asks.
  bool sessions() const { return sessions_.load(std::memory_order_relaxed); }
  void SetSessions(bool wanted) { sessions_.store(wanted, std::memory_order_relaxed); }

  int64_t dropped() const;

 private:
  struct Writer;

  const LogFormat format_;
  const std::shared_ptr<Writer> writer_;  // its thread's too
  std::atomic<bool> sessions_{true};
};

}  // namespace structkv::rpc
