#include "service/rpc/log.h"

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <deque>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "nlohmann/json.hpp"

namespace structkv::rpc {
namespace {

std::string Now() {
  return absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone());
}

bool IsPlain(std::string_view text) {
  if (text.empty()) return false;
  for (char c : text) {
    if (c <= ' ' || c == '"' || c == '=' || c == '\\' || c > '~') return false;
  }
  return true;
}

std::string TextLine(std::string_view event, std::initializer_list<LogField> fields) {
  std::string line = absl::StrCat(Now(), " ", absl::string_view(event.data(), event.size()));
  for (const auto& [key, value] : fields) {
    absl::StrAppend(&line, " ", absl::string_view(key.data(), key.size()), "=");
    if (const auto* number = std::get_if<int64_t>(&value)) {
      absl::StrAppend(&line, *number);
      continue;
    }
    const auto text = std::get<std::string_view>(value);
    const absl::string_view view(text.data(), text.size());
    if (IsPlain(text)) {
      absl::StrAppend(&line, view);
    } else {
      absl::StrAppend(&line, "\"", absl::CHexEscape(view), "\"");
    }
  }
  return absl::StrCat(line, "\n");
}

std::string JsonLine(std::string_view event, std::initializer_list<LogField> fields) {
  nlohmann::ordered_json line;
  line["time"] = Now();
  line["event"] = event;
  for (const auto& [key, value] : fields) {
    if (const auto* number = std::get_if<int64_t>(&value)) {
      line[std::string(key)] = *number;
    } else {
      line[std::string(key)] = std::get<std::string_view>(value);
    }
  }
  // Bytes that are no UTF-8 are replaced.
  return line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace

struct Log::Writer {
  explicit Writer(int to) : fd(to) {}

  void Add(std::string line) {
    absl::MutexLock lock(&mutex);
    if (waiting_bytes + line.size() > kMaxWaitingBytes) {
      ++dropped;
      return;
    }
    waiting_bytes += line.size();
    ++taken;
    lines.push_back(std::move(line));
  }

  void Run() {
    mutex.Lock();
    while (true) {
      mutex.Await(absl::Condition(this, &Writer::HasWork));
      if (lines.empty()) break;  // ended
      const std::string line = std::move(lines.front());
      lines.pop_front();
      mutex.Unlock();
      const bool written = WriteLine(line);
      mutex.Lock();
      waiting_bytes -= line.size();
      if (!written) ++dropped;
      ++done;
    }
    mutex.Unlock();
  }

  // All of it in one write() where that is taken whole, so that lines of several processes do not
  // mix.
  bool WriteLine(std::string_view line) const {
    while (!line.empty()) {
      const ssize_t written = write(fd, line.data(), line.size());
      if (written > 0) {
        line.remove_prefix(static_cast<size_t>(written));
      } else if (written < 0 && errno == EAGAIN) {
        // Whoever else has the descriptor may have made it one that does not block.
        pollfd room = {.fd = fd, .events = POLLOUT, .revents = 0};
        poll(&room, 1, -1);
      } else if (written == 0 || errno != EINTR) {
        return false;
      }
    }
    return true;
  }

  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return ended || !lines.empty(); }

  const int fd;
  absl::Mutex mutex;
  std::deque<std::string> lines ABSL_GUARDED_BY(mutex);
  size_t waiting_bytes ABSL_GUARDED_BY(mutex) = 0;  // the one that is being written too
  int64_t dropped ABSL_GUARDED_BY(mutex) = 0;
  int64_t taken ABSL_GUARDED_BY(mutex) = 0;  // into `lines`, ever
  int64_t done ABSL_GUARDED_BY(mutex) = 0;   // of them
  bool ended ABSL_GUARDED_BY(mutex) = false;
};

Log::Log(LogFormat format, int fd) : format_(format), writer_(std::make_shared<Writer>(fd)) {
  // A signal that a program waits for must not end it by way of this thread.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread([writer = writer_] { writer->Run(); }).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Log::~Log() {
  Flush(absl::Seconds(1));
  absl::MutexLock lock(&writer_->mutex);
  writer_->ended = true;
  // What waits behind a write() that hangs.
  writer_->lines.clear();
}

void Log::Write(std::string_view event, std::initializer_list<LogField> fields) {
  writer_->Add(format_ == LogFormat::kJson ? JsonLine(event, fields) : TextLine(event, fields));
}

bool Log::Flush(absl::Duration limit) {
  absl::MutexLock lock(&writer_->mutex);
  const auto written = [writer = writer_.get(), taken = writer_->taken] {
    writer->mutex.AssertHeld();
    return writer->done >= taken;
  };
  return writer_->mutex.AwaitWithTimeout(absl::Condition(&written), limit);
}

int64_t Log::dropped() const {
  absl::MutexLock lock(&writer_->mutex);
  return writer_->dropped;
}

}  // namespace structkv::rpc
