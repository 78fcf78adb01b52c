#include "service/rpc/log.h"

#include <unistd.h>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
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

void Log::Write(std::string_view event, std::initializer_list<LogField> fields) {
  const std::string line =
      format_ == LogFormat::kJson ? JsonLine(event, fields) : TextLine(event, fields);
  const ssize_t written = write(fd_, line.data(), line.size());
  if (written != static_cast<ssize_t>(line.size())) {
    dropped_.fetch_add(1, std::memory_order_relaxed);
  }
}

}  // namespace structkv::rpc
