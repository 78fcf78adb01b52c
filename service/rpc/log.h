// Structured log lines, one write() each, to a file descriptor.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace structkv::rpc {

enum class LogFormat : uint8_t { kText, kJson };

// A named value of a line.
using LogField = std::pair<std::string_view, std::variant<int64_t, std::string_view>>;

// What stands for a value that is not there.
inline std::string_view OrDash(std::string_view text) { return text.empty() ? "-" : text; }

// Thread-safe. A line that cannot be written (a full disk, a closed pipe) is dropped and counted.
class Log {
 public:
  // Does not own `fd`.
  explicit Log(LogFormat format, int fd = 2) : format_(format), fd_(fd) {}

  // Text: "2026-01-02T03:04:05.678Z event key=value ..."; JSON: one object with "time" and "event".
  void Write(std::string_view event, std::initializer_list<LogField> fields);

  // Whether a line is wanted at the end of each stream; whoever writes those asks.
  bool sessions() const { return sessions_.load(std::memory_order_relaxed); }
  void SetSessions(bool wanted) { sessions_.store(wanted, std::memory_order_relaxed); }

  int64_t dropped() const { return dropped_.load(std::memory_order_relaxed); }

 private:
  const LogFormat format_;
  const int fd_;
  std::atomic<int64_t> dropped_{0};
  std::atomic<bool> sessions_{true};
};

}  // namespace structkv::rpc
