#include <sys/random.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "kernels/imported_memory.h"

namespace structkv {

std::string ProcessId() {
  static const std::string random = [] {
    std::string bytes(kProcessIdBytes, '\0');
    // So few bytes are never cut short, and nothing goes on without them.
    if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
      std::abort();
    }
    return bytes;
  }();
  // A forked child has the same random bytes, and other memory.
  std::string id = random;
  const pid_t process = getpid();
  std::memcpy(id.data(), &process, sizeof(process));
  return id;
}

}  // namespace structkv
