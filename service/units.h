// Sizes and durations as people write them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace structkv {

// "4194304", "512MiB", "8GiB", "1.5GB": a number with an optional unit of B, kB, MB, GB, TB (powers
// of 1000) or KiB, MiB, GiB, TiB (powers of 1024). nullopt where it is none, is negative or does
// not fit.
std::optional<int64_t> ParseBytes(std::string_view text);
// The largest binary unit that divides it: "8GiB".
std::string FormatBytes(int64_t bytes);

// "500ms", "30s", "1m30s", "2h", in milliseconds. A unit is required, save for 0.
std::optional<int64_t> ParseMillis(std::string_view text);
std::string FormatMillis(int64_t millis);

}  // namespace structkv
