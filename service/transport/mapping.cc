#include "service/transport/mapping.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"

namespace structkv::transport {

absl::StatusOr<std::unique_ptr<Mapping>> Mapping::Map(FileDescriptor file, int64_t size,
                                                      bool writable, bool sealed) {
  void* data = mmap(nullptr, static_cast<size_t>(size), PROT_READ | (writable ? PROT_WRITE : 0),
                    MAP_SHARED, file.get(), 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    const std::string text = absl::StrCat("mapping ", size, " bytes of the region",
                                          writable ? " to be written" : "", " failed");
    if (error == EPERM || error == EACCES) {
      return absl::PermissionDeniedError(
          absl::StrCat(text, ": the file is not ",
                       writable ? "open, or is sealed, for writing" : "open for reading"));
    }
    return absl::ResourceExhaustedError(absl::StrCat(text, ", error ", error));
  }
  std::unique_ptr<Mapping> mapping(new Mapping());
  mapping->data_ = static_cast<std::byte*>(data);
  mapping->size_ = size;
  mapping->writable_ = writable;
  if (!sealed) mapping->file_ = std::move(file);
  absl::StatusOr<BusGuard> guard = BusGuard::Watch(data, static_cast<size_t>(size));
  if (!guard.ok()) return guard.status();
  mapping->guard_.emplace(*std::move(guard));
  return mapping;
}

Mapping::~Mapping() {
  guard_.reset();
  munmap(data_, static_cast<size_t>(size_));
}

absl::Status Mapping::Check() const {
  int64_t now = -1;
  if (file_.valid()) {
    struct stat status = {};
    if (fstat(file_.get(), &status) == 0) now = status.st_size;
  }
  const bool shorter = now >= 0 && now < size_;
  if (!guard_->hit() && !shorter) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("bytes of the region are gone: it was registered with ", size_, " bytes, ",
                   shorter ? absl::StrCat("and its file has ", now, " now (it was truncated)")
                           : "and an access found some of them missing"));
}

}  // namespace structkv::transport
