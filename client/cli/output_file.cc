#include "client/cli/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace structkv::cli {
namespace {

constexpr mode_t kMode = 0666;

absl::Status SystemError(const std::string& path, const char* what) {
  return absl::UnknownError(absl::StrCat(path, ": ", what, ": ", std::strerror(errno)));
}

std::string FolderOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

absl::StatusOr<std::unique_ptr<OutputFile>> OutputFile::Create(const std::string& path) {
  struct stat there = {};
  if (stat(path.c_str(), &there) == 0 && !S_ISREG(there.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": is no regular file, and would be replaced by one"));
  }
  std::unique_ptr<OutputFile> file(new OutputFile());
  file->path_ = path;
  file->partial_path_ = absl::StrCat(path, ".partial.", getpid());
  file->fd_ = open(FolderOf(path).c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, kMode);
  if (file->fd_ < 0) {  // the file system has no nameless files
    file->fd_ = open(file->partial_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, kMode);
    file->named_ = file->fd_ >= 0;
  }
  if (file->fd_ < 0) return SystemError(path, "cannot create");
  return file;
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) close(fd_);
  if (named_) unlink(partial_path_.c_str());
}

absl::Status OutputFile::WriteAt(uint64_t offset, absl::Span<const std::byte> data) const {
  while (!data.empty()) {
    const ssize_t wrote = pwrite(fd_, data.data(), data.size(), static_cast<off_t>(offset));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) return SystemError(path_, "cannot write");
    offset += static_cast<uint64_t>(wrote);
    data.remove_prefix(static_cast<size_t>(wrote));
  }
  return absl::OkStatus();
}

absl::Status OutputFile::GiveName() {
  if (named_) return absl::OkStatus();
  // A name can be given, not taken over, so the file gets one of its own first.
  const std::string self = absl::StrCat("/proc/self/fd/", fd_);
  unlink(partial_path_.c_str());
  if (linkat(AT_FDCWD, self.c_str(), AT_FDCWD, partial_path_.c_str(), AT_SYMLINK_FOLLOW) != 0) {
    return SystemError(path_, "cannot create");
  }
  named_ = true;
  return absl::OkStatus();
}

absl::Status OutputFile::Finish() {
  if (absl::Status status = GiveName(); !status.ok()) return status;
  if (close(std::exchange(fd_, -1)) != 0) return SystemError(path_, "cannot write");
  if (std::rename(partial_path_.c_str(), path_.c_str()) != 0) {
    return SystemError(path_, "cannot create");
  }
  named_ = false;
  return absl::OkStatus();
}

absl::Status WriteFile(const std::string& path, std::string_view content) {
  absl::StatusOr<std::unique_ptr<OutputFile>> file = OutputFile::Create(path);
  if (!file.ok()) return file.status();
  absl::Status written =
      (*file)->WriteAt(0, {reinterpret_cast<const std::byte*>(content.data()), content.size()});
  return written.ok() ? (*file)->Finish() : written;
}

absl::Status CheckNotInput(const std::string& output, const std::string& input) {
  struct stat out = {};
  struct stat in = {};
  if (stat(output.c_str(), &out) != 0 || stat(input.c_str(), &in) != 0) return absl::OkStatus();
  if (out.st_dev != in.st_dev || out.st_ino != in.st_ino) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--out ", output, ": is the input, which it would replace"));
}

}  // namespace structkv::cli
