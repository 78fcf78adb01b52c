// The files behind regions: descriptors that clients pass, and names in /dev/shm.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "service/transport/file_descriptor.h"

namespace structkv::transport {

// Names of regions begin with this, which is what the sweeper goes by.
inline constexpr char kRegionPrefix[] = "structkv.";
inline constexpr size_t kMaxRegionNameBytes = 200;  // behind the prefix
inline constexpr char kRegionDirectory[] = "/dev/shm";

// Whether a descriptor may become a region of `size` bytes: a file of a tmpfs, or of whole huge
// pages, sealed against shrinking, and at least so long. INVALID_ARGUMENT, FAILED_PRECONDITION
// without the seal.
absl::Status CheckDescriptor(int fd, int64_t size);

// A file that was opened by its name.
struct NamedFile {
  FileDescriptor file;
  int64_t owner = 0;  // user id
};

// Opens `name` in the directory. INVALID_ARGUMENT where the name is none of a region, or the file
// is not a regular one of a tmpfs of at least `size` bytes; NOT_FOUND; PERMISSION_DENIED.
absl::StatusOr<NamedFile> OpenNamed(const std::string& directory, const std::string& name,
                                    int64_t size, bool writable);

// Removes the name, where it still is that file's. PERMISSION_DENIED where it may not be removed.
absl::Status RemoveName(const std::string& directory, const std::string& name, int fd);

// Removes regions' files that are older than `age` and that nobody holds with flock: their creators
// went away before they could register them. Returns how many.
int SweepNames(const std::string& directory, absl::Duration age);

}  // namespace structkv::transport
