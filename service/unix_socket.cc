#include "service/unix_socket.h"

#include <sys/un.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/strip.h"

namespace structkv {

bool UnixSocketInUse(const std::string& address, int type) {
  absl::string_view path = address;
  if (!absl::ConsumePrefix(&path, "unix:")) return false;
  if (absl::StartsWith(path, "//")) path.remove_prefix(2);
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(name.sun_path)) return false;
  std::memcpy(name.sun_path, path.data(), path.size());
  const int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  const bool answered = connect(fd, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) == 0;
  close(fd);
  return answered;
}

}  // namespace structkv
