// The safetensors file format: eight bytes of header length, a JSON header, and dense tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace structkv::cli {

// Longest header that is accepted, as in the format's own library.
inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;

// Bytes of one element of a safetensors dtype ("F32", "BF16", ...); 0 for an unknown one.
uint64_t SafetensorsElementBytes(std::string_view dtype);

// A tensor of a file.
struct TensorInfo {
  std::string dtype;
  std::vector<int64_t> shape;
  // Place in the file's data section.
  uint64_t begin = 0;
  uint64_t end = 0;

  uint64_t size_bytes() const { return end - begin; }
};

// "[2, 1000, 32]"
std::string ShapeText(absl::Span<const int64_t> shape);

struct SafetensorsHeader {
  std::map<std::string, TensorInfo> tensors;
  std::map<std::string, std::string> metadata;
};

// Parses and validates a header against the bytes of data that follow it: known dtypes, sizes that
// match shapes, and tensors that cover the data without gap or overlap. INVALID_ARGUMENT names the
// tensor and the field.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view json,
                                                         uint64_t data_bytes);

// A file, mapped read-only. Thread-safe. The file must not be truncated while it is open.
class SafetensorsFile {
 public:
  // NOT_FOUND or another code of the system's where the file cannot be read; INVALID_ARGUMENT where
  // it is no valid safetensors file. Every text starts with the path.
  static absl::StatusOr<std::shared_ptr<const SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const std::map<std::string, TensorInfo>& tensors() const { return header_.tensors; }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  // Null where there is no such tensor.
  const TensorInfo* Find(const std::string& name) const;
  // Valid as long as the file. Aligned to the dtype only as far as the writer saw to it.
  absl::Span<const std::byte> Data(const TensorInfo& tensor) const;
  // Copies a tensor of 4-byte elements ("F32", "I32") into a vector.
  template <typename T>
  std::vector<T> Values(const TensorInfo& tensor) const;

 private:
  SafetensorsFile() = default;

  std::string path_;
  void* map_ = nullptr;
  size_t map_size_ = 0;
  size_t data_begin_ = 0;
  SafetensorsHeader header_;
};

}  // namespace structkv::cli
