#include "service/units.h"

#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"

namespace structkv {
namespace {

constexpr std::pair<const char*, int64_t> kUnits[] = {
    {"TiB", int64_t{1} << 40},
    {"GiB", int64_t{1} << 30},
    {"MiB", int64_t{1} << 20},
    {"KiB", int64_t{1} << 10},
    {"TB", 1'000'000'000'000},
    {"GB", 1'000'000'000},
    {"MB", 1'000'000},
    {"kB", 1'000},
    {"B", 1},
};

}  // namespace

std::optional<int64_t> ParseBytes(std::string_view text) {
  absl::string_view number(text.data(), text.size());
  int64_t unit = 1;
  for (const auto& [name, bytes] : kUnits) {
    if (absl::ConsumeSuffix(&number, name)) {
      unit = bytes;
      break;
    }
  }
  number = absl::StripAsciiWhitespace(number);
  int64_t whole = 0;
  if (absl::SimpleAtoi(number, &whole)) {
    if (whole < 0 || whole > std::numeric_limits<int64_t>::max() / unit) return std::nullopt;
    return whole * unit;
  }
  double fraction = 0;
  if (!absl::SimpleAtod(number, &fraction) || !std::isfinite(fraction) || fraction < 0) {
    return std::nullopt;
  }
  const double bytes = fraction * static_cast<double>(unit);
  if (bytes >= 9.2e18) return std::nullopt;
  return static_cast<int64_t>(bytes);
}

std::string FormatBytes(int64_t bytes) {
  for (const auto& [name, unit] : kUnits) {
    const bool binary = absl::string_view(name).size() == 3;
    if (binary && bytes >= unit && bytes % unit == 0) return absl::StrCat(bytes / unit, name);
  }
  return absl::StrCat(bytes, "B");
}

std::optional<int64_t> ParseMillis(std::string_view text) {
  absl::Duration duration;
  if (!absl::ParseDuration(absl::string_view(text.data(), text.size()), &duration) ||
      duration < absl::ZeroDuration() || duration > absl::Hours(24 * 3650)) {
    return std::nullopt;
  }
  return absl::ToInt64Milliseconds(duration);
}

std::string FormatMillis(int64_t millis) {
  return absl::FormatDuration(absl::Milliseconds(millis));
}

}  // namespace structkv
