// Numbers, tables and progress for people.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"

namespace structkv::cli {

// "131,072"
std::string CountText(uint64_t value);
// "3.07 MB": decimal units, three digits.
std::string BytesText(uint64_t bytes);
// "12.3 ms"
std::string DurationText(absl::Duration duration);
// "10.0 %"
std::string PercentText(double share);

// Columns that are as wide as they need to be; the first is aligned left, the others right.
class Table {
 public:
  explicit Table(std::vector<std::string> header);
  void Add(std::vector<std::string> row);
  // Lines that end with a newline, each after `indent`.
  std::string Text(std::string_view indent = "") const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

// A line on standard error that is drawn over again; nothing where that is no terminal. Not
// thread-safe.
class Progress {
 public:
  explicit Progress(std::string label);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void Update(uint64_t done, uint64_t total, std::string_view detail = "");
  // Removes the line.
  void Clear();

 private:
  const std::string label_;
  const bool terminal_;
  bool drawn_ = false;
  absl::Time last_ = absl::InfinitePast();
};

}  // namespace structkv::cli
