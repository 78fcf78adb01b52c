#include "client/cli/text.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"

namespace structkv::cli {
namespace {

// Terminal columns of UTF-8 text without wide or combining characters.
size_t Width(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

// Three significant digits.
std::string Short(double value) {
  if (value >= 99.95) return absl::StrFormat("%.0f", value);
  if (value >= 9.995) return absl::StrFormat("%.1f", value);
  return absl::StrFormat("%.2f", value);
}

}  // namespace

std::string CountText(uint64_t value) {
  const std::string digits = absl::StrCat(value);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text.push_back(',');
    text.push_back(digits[i]);
  }
  return text;
}

std::string BytesText(uint64_t bytes) {
  constexpr const char* kUnits[] = {"kB", "MB", "GB", "TB", "PB"};
  if (bytes < 1000) return absl::StrCat(bytes, " B");
  double value = static_cast<double>(bytes) / 1000;
  size_t unit = 0;
  while (value >= 999.5 && unit + 1 < std::size(kUnits)) {
    value /= 1000;
    ++unit;
  }
  return absl::StrCat(Short(value), " ", kUnits[unit]);
}

std::string DurationText(absl::Duration duration) {
  const double seconds = absl::ToDoubleSeconds(duration);
  if (seconds < 1e-3) return absl::StrCat(Short(seconds * 1e6), " µs");
  if (seconds < 1) return absl::StrCat(Short(seconds * 1e3), " ms");
  return absl::StrCat(Short(seconds), " s");
}

std::string PercentText(double share) { return absl::StrFormat("%.1f %%", 100 * share); }

Table::Table(std::vector<std::string> header) { rows_.push_back(std::move(header)); }

void Table::Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }

std::string Table::Text(std::string_view indent) const {
  std::vector<size_t> widths(rows_.front().size());
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], Width(row[i]));
  }
  std::string text;
  for (size_t r = 0; r < rows_.size(); ++r) {
    std::string line(indent);
    for (size_t i = 0; i < rows_[r].size(); ++i) {
      const std::string pad(widths[i] - Width(rows_[r][i]), ' ');
      if (i > 0) line += "  ";
      line += i == 0 ? rows_[r][i] + pad : pad + rows_[r][i];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
    if (r == 0) {
      size_t total = 2 * (widths.size() - 1);
      for (size_t width : widths) total += width;
      text.append(indent);
      for (size_t i = 0; i < total; ++i) text += "─";
      text += "\n";
    }
  }
  return text;
}

Progress::Progress(std::string label)
    : label_(std::move(label)), terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() { Clear(); }

void Progress::Update(uint64_t done, uint64_t total, std::string_view detail) {
  const absl::Time now = absl::Now();
  if (!terminal_ || total == 0 || (done < total && now - last_ < absl::Milliseconds(50))) return;
  last_ = now;
  constexpr uint64_t kCells = 30;
  const uint64_t filled = kCells * std::min(done, total) / total;
  std::string bar;
  for (uint64_t i = 0; i < kCells; ++i) bar += i < filled ? "█" : "░";
  std::fprintf(stderr, "\r\x1b[2K%s %s %llu/%llu %.*s", label_.c_str(), bar.c_str(),
               static_cast<unsigned long long>(done), static_cast<unsigned long long>(total),
               static_cast<int>(detail.size()), detail.data());
  std::fflush(stderr);
  drawn_ = true;
}

void Progress::Clear() {
  if (!drawn_) return;
  std::fputs("\r\x1b[2K", stderr);
  std::fflush(stderr);
  drawn_ = false;
}

}  // namespace structkv::cli
