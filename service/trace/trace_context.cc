#include "service/trace/trace_context.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "absl/random/random.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_split.h"

namespace structkv::trace {
namespace {

// version "-" trace-id "-" parent-id "-" trace-flags
constexpr size_t kParentBytes = 55;
constexpr size_t kTraceAt = 3;
constexpr size_t kSpanAt = 36;
constexpr size_t kFlagsAt = 53;
constexpr uint8_t kSampledFlag = 1;

// -1: no lower-case hexadecimal digit.
int Digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

// Reads two digits for each byte of `out`.
template <size_t size>
bool ReadHex(absl::string_view text, std::array<uint8_t, size>* out) {
  for (size_t i = 0; i < size; ++i) {
    const int high = Digit(text[2 * i]);
    const int low = Digit(text[2 * i + 1]);
    if (high < 0 || low < 0) return false;
    (*out)[i] = static_cast<uint8_t>(high << 4 | low);
  }
  return true;
}

template <size_t size>
bool IsZero(const std::array<uint8_t, size>& id) {
  return std::all_of(id.begin(), id.end(), [](uint8_t byte) { return byte == 0; });
}

template <size_t size>
std::array<uint8_t, size> NewId() {
  static thread_local absl::BitGen random;
  std::array<uint8_t, size> id;
  do {
    for (uint8_t& byte : id) byte = absl::Uniform<uint8_t>(random);
  } while (IsZero(id));
  return id;
}

template <size_t size>
std::string HexOf(const std::array<uint8_t, size>& id) {
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(id.data()), size));
}

// lcalpha / DIGIT / "_" / "-"/ "*" / "/"
bool IsKeyChar(char c) {
  return absl::ascii_islower(static_cast<unsigned char>(c)) ||
         absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '_' || c == '-' || c == '*' ||
         c == '/';
}

bool IsKeyPart(absl::string_view text, size_t longest, bool digit_first) {
  if (text.empty() || text.size() > longest) return false;
  const auto first = static_cast<unsigned char>(text[0]);
  if (!absl::ascii_islower(first) && !(digit_first && absl::ascii_isdigit(first))) return false;
  return std::all_of(text.begin(), text.end(), IsKeyChar);
}

// A simple key, or tenant@system.
bool IsKey(absl::string_view key) {
  const size_t at = key.find('@');
  if (at == absl::string_view::npos) return IsKeyPart(key, 256, /*digit_first=*/false);
  return IsKeyPart(key.substr(0, at), 241, /*digit_first=*/true) &&
         IsKeyPart(key.substr(at + 1), 14, /*digit_first=*/false);
}

// Printable ASCII but for "," and "="; no blank at the end.
bool IsValue(absl::string_view value) {
  if (value.empty() || value.size() > 256 || value.back() == ' ') return false;
  return std::all_of(value.begin(), value.end(),
                     [](char c) { return c >= ' ' && c <= '~' && c != ',' && c != '='; });
}

}  // namespace

std::optional<Parent> ParseTraceParent(absl::string_view text) {
  if (text.size() < kParentBytes) return std::nullopt;
  std::array<uint8_t, 1> version = {};
  std::array<uint8_t, 1> flags = {};
  Parent parent;
  if (text[kTraceAt - 1] != '-' || text[kSpanAt - 1] != '-' || text[kFlagsAt - 1] != '-' ||
      !ReadHex(text, &version) || !ReadHex(text.substr(kTraceAt), &parent.trace) ||
      !ReadHex(text.substr(kSpanAt), &parent.span) || !ReadHex(text.substr(kFlagsAt), &flags)) {
    return std::nullopt;
  }
  if (version[0] == 0xff || IsZero(parent.trace) || IsZero(parent.span)) return std::nullopt;
  if (text.size() > kParentBytes && (version[0] == 0 || text[kParentBytes] != '-')) {
    return std::nullopt;
  }
  parent.sampled = (flags[0] & kSampledFlag) != 0;
  return parent;
}

std::string JoinTraceState(const std::vector<absl::string_view>& values) {
  std::string joined;
  std::set<absl::string_view> keys;
  for (const absl::string_view value : values) {
    for (absl::string_view member : absl::StrSplit(value, ',')) {
      // Blanks around a member mean nothing.
      while (!member.empty() && (member.front() == ' ' || member.front() == '\t')) {
        member.remove_prefix(1);
      }
      while (!member.empty() && (member.back() == ' ' || member.back() == '\t')) {
        member.remove_suffix(1);
      }
      if (member.empty()) continue;
      const size_t equals = member.find('=');
      if (equals == absl::string_view::npos) return "";
      const absl::string_view key = member.substr(0, equals);
      if (!IsKey(key) || !IsValue(member.substr(equals + 1))) return "";
      if (!keys.insert(key).second || keys.size() > kMaxStateMembers) return "";
      if (!joined.empty()) joined += ',';
      joined.append(member.data(), member.size());
    }
  }
  return joined;
}

TraceId NewTraceId() { return NewId<sizeof(TraceId)>(); }
SpanId NewSpanId() { return NewId<sizeof(SpanId)>(); }

std::string Hex(const TraceId& id) { return HexOf(id); }
std::string Hex(const SpanId& id) { return HexOf(id); }

bool SamplesRoot(const TraceId& id, double ratio) {
  // The last 7 bytes are random in every trace id that says so.
  uint64_t random = 0;
  for (size_t i = sizeof(TraceId) - 7; i < sizeof(TraceId); ++i) random = random << 8 | id[i];
  random >>= 3;  // what a double holds exactly
  return static_cast<double>(random) < ratio * static_cast<double>(uint64_t{1} << 53);
}

}  // namespace structkv::trace
