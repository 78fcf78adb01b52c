// The pivot profile as a file: JSON with a checksum, replaced as a whole.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace structkv::session {

// What a pivot depends on beside the prompt.
struct PivotModel {
  std::string model_id;
  int64_t layers = 0;
  // Sparsity ratio, weights of entropy, sparsity and variance, begin and end of the search.
  std::array<double, 6> detection{};

  bool operator<(const PivotModel& other) const {
    return std::tie(model_id, layers, detection) <
           std::tie(other.model_id, other.layers, other.detection);
  }
};

// Prompts by pivot layer.
using PivotCounts = std::map<int64_t, int64_t>;

struct PivotRecord {
  PivotModel model;
  PivotCounts counts;
};

// The text of a file. Records keep their order.
std::string EncodePivotFile(const std::vector<PivotRecord>& records);

// DATA_LOSS, saying what is wrong, where `text` is no such file, or not whole.
absl::StatusOr<std::vector<PivotRecord>> DecodePivotFile(const std::string& text);

// The file's text. NOT_FOUND where there is no file.
absl::StatusOr<std::string> ReadPivotFile(const std::string& path);

// Replaces the file: whoever reads it, also after a crash, finds the old text or the new one.
absl::Status WritePivotFile(const std::string& path, const std::string& text);

// Gives the file another name that is free, and returns it.
absl::StatusOr<std::string> SetPivotFileAside(const std::string& path);

// Whether the file's directory exists and can be written to.
absl::Status CheckPivotDirectory(const std::string& path);

}  // namespace structkv::session
