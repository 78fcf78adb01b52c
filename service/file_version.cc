#include "service/file_version.h"

#include <sys/stat.h>

#include "absl/strings/str_cat.h"

namespace structkv {

std::string FileVersion(const std::string& path) {
  struct stat file = {};
  if (stat(path.c_str(), &file) != 0) return "";
  return absl::StrCat(file.st_ino, " ", file.st_size, " ", file.st_mtim.tv_sec, " ",
                      file.st_mtim.tv_nsec);
}

}  // namespace structkv
