#include "service/transport/region_files.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <memory>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace structkv::transport {
namespace {

std::string ErrorText(int error) { return std::generic_category().message(error); }

absl::Status CheckSize(int64_t file_bytes, int64_t size) {
  if (file_bytes >= size) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("size_bytes is ", size, "; the file has ", file_bytes, " bytes"));
}

absl::Status CheckName(absl::string_view name) {
  absl::string_view rest = name;
  const bool valid = absl::ConsumePrefix(&rest, kRegionPrefix) && !rest.empty() &&
                     rest.size() <= kMaxRegionNameBytes &&
                     std::all_of(rest.begin(), rest.end(), [](char c) {
                       return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' ||
                              c == '-' || c == '_';
                     });
  if (valid) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "name is '", name.substr(0, 64), "' (", name.size(), " bytes); allowed: '", kRegionPrefix,
      "' and 1 to ", kMaxRegionNameBytes, " letters, digits, dots, hyphens or underscores"));
}

bool SameFile(const struct stat& one, const struct stat& other) {
  return one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

// Removes the file where it is older than `age`, still has its name, and nobody holds it.
bool RemoveIfAbandoned(int directory, const char* name, absl::Duration age) {
  const FileDescriptor file(
      openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat status = {};
  if (!file.valid() || fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) return false;
  timespec now = {};
  clock_gettime(CLOCK_REALTIME, &now);
  if (absl::TimeFromTimespec(now) - absl::TimeFromTimespec(status.st_ctim) < age) return false;
  if (flock(file.get(), LOCK_EX | LOCK_NB) != 0) return false;
  // Under the lock: its creator may just have replaced it.
  struct stat again = {};
  return fstatat(directory, name, &again, AT_SYMLINK_NOFOLLOW) == 0 && SameFile(status, again) &&
         unlinkat(directory, name, 0) == 0;
}

}  // namespace

absl::Status CheckDescriptor(int fd, int64_t size) {
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0) {
    return absl::InvalidArgumentError(
        "the descriptor is no file that can be sealed; a memfd made with MFD_ALLOW_SEALING is "
        "needed");
  }
  if ((seals & F_SEAL_SHRINK) == 0) {
    return absl::FailedPreconditionError(
        "the descriptor is not sealed against shrinking; add F_SEAL_SHRINK (fcntl F_ADD_SEALS) "
        "once it has its size");
  }
  struct stat status = {};
  struct statfs system = {};
  if (fstat(fd, &status) != 0 || fstatfs(fd, &system) != 0) {
    return absl::InvalidArgumentError(ErrorText(errno));
  }
  // Of huge pages a part can be neither unmapped nor replaced.
  if (system.f_type == HUGETLBFS_MAGIC && size % system.f_bsize != 0) {
    return absl::InvalidArgumentError(absl::StrCat("size_bytes is ", size,
                                                   "; the file has huge pages, and multiples of ",
                                                   system.f_bsize, " bytes are allowed"));
  }
  return CheckSize(status.st_size, size);
}

absl::StatusOr<NamedFile> OpenNamed(const std::string& directory, const std::string& name,
                                    int64_t size, bool writable) {
  if (absl::Status valid = CheckName(name); !valid.ok()) return valid;
  const std::string path = absl::StrCat(directory, "/", name);
  FileDescriptor file(
      open(path.c_str(), (writable ? O_RDWR : O_RDONLY) | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!file.valid()) {
    const int error = errno;
    const std::string text = absl::StrCat(path, ": ", ErrorText(error));
    if (error == ENOENT) return absl::NotFoundError(text);
    if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(text);
    return absl::InvalidArgumentError(text);
  }
  struct stat status = {};
  struct statfs system = {};
  if (fstat(file.get(), &status) != 0 || fstatfs(file.get(), &system) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", ErrorText(errno)));
  }
  if (!S_ISREG(status.st_mode) || system.f_type != TMPFS_MAGIC) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is no regular file of a tmpfs"));
  }
  if (absl::Status enough = CheckSize(status.st_size, size); !enough.ok()) return enough;
  return NamedFile{std::move(file), static_cast<int64_t>(status.st_uid)};
}

absl::Status RemoveName(const std::string& directory, const std::string& name, int fd) {
  const std::string path = absl::StrCat(directory, "/", name);
  struct stat file = {};
  struct stat named = {};
  if (fstat(fd, &file) != 0 || lstat(path.c_str(), &named) != 0 || !SameFile(file, named)) {
    return absl::OkStatus();  // the client was quicker
  }
  if (unlink(path.c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat(
      "the name ", path, " cannot be removed (", ErrorText(errno),
      "): the server has another user; pass a descriptor over the region socket instead"));
}

int SweepNames(const std::string& directory, absl::Duration age) {
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(opendir(directory.c_str()), closedir);
  if (entries == nullptr) return 0;
  int removed = 0;
  while (const dirent* entry = readdir(entries.get())) {  // NOLINT(concurrency-mt-unsafe)
    if (!absl::StartsWith(entry->d_name, kRegionPrefix)) continue;
    if (RemoveIfAbandoned(dirfd(entries.get()), entry->d_name, age)) ++removed;
  }
  return removed;
}

}  // namespace structkv::transport
