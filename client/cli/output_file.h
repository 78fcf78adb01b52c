// A file that appears under its name when it is whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace structkv::cli {

// What is written has no name until Finish() succeeds, so an object that is destroyed before, or a
// process that is killed, leaves nothing behind and what was there untouched. (Where the file
// system knows no nameless files, a kill leaves NAME.partial.PID.) Not thread-safe.
class OutputFile {
 public:
  // INVALID_ARGUMENT where `path` is there already and is no regular file; UNKNOWN where nothing
  // can be created there.
  static absl::StatusOr<std::unique_ptr<OutputFile>> Create(const std::string& path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  const std::string& path() const { return path_; }
  absl::Status WriteAt(uint64_t offset, absl::Span<const std::byte> data) const;
  // Gives the file its name, in place of what had it. The object is of no use afterwards.
  absl::Status Finish();

 private:
  OutputFile() = default;
  absl::Status GiveName();

  std::string path_;
  std::string partial_path_;
  bool named_ = false;  // there is a file at partial_path_
  int fd_ = -1;
};

// Writes all of a file at once.
absl::Status WriteFile(const std::string& path, std::string_view content);

// INVALID_ARGUMENT where `output` is the file `input`, under whichever name.
absl::Status CheckNotInput(const std::string& output, const std::string& input);

}  // namespace structkv::cli
