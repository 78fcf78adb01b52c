// Writes a safetensors file piece by piece, so that it needs no more memory than a piece.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/cli/output_file.h"
#include "client/cli/safetensors.h"

namespace structkv::cli {

// A tensor to come.
struct TensorDeclaration {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
};

// The tensors are declared first; their data come in any order, and the metadata last. The file
// appears under its name when Finish() succeeds (see OutputFile). Not thread-safe.
class SafetensorsWriter {
 public:
  // `metadata_reserve_bytes`: room in the header for the metadata that Finish() brings.
  // INVALID_ARGUMENT for an unknown dtype or a name that comes twice; also the errors of
  // OutputFile.
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(
      const std::string& path, std::vector<TensorDeclaration> tensors,
      size_t metadata_reserve_bytes = 16 * 1024);

  // Writes a whole tensor. NOT_FOUND for one that was not declared, INVALID_ARGUMENT where the size
  // differs or it was written before.
  absl::Status Write(const std::string& name, absl::Span<const std::byte> data);
  template <typename T>
  absl::Status WriteValues(const std::string& name, absl::Span<const T> values) {
    return Write(name,
                 {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)});
  }

  // Writes the header and gives the file its name. FAILED_PRECONDITION names a tensor that is
  // missing. The writer is of no use afterwards.
  absl::Status Finish(const std::map<std::string, std::string>& metadata);

 private:
  SafetensorsWriter() = default;
  std::string Header(const std::map<std::string, std::string>& metadata) const;

  std::unique_ptr<OutputFile> file_;
  uint64_t header_bytes_ = 0;
  std::vector<std::string> order_;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, bool> written_;
};

}  // namespace structkv::cli
