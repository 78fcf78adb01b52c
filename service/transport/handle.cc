#include "service/transport/handle.h"

#include <sys/random.h>

#include <cstdio>
#include <cstdlib>

namespace structkv::transport {

std::string NewHandle() {
  std::string handle(kHandleBytes, '\0');
  // So few bytes are never cut short or interrupted, and nothing goes on without them.
  if (getrandom(handle.data(), handle.size(), 0) != static_cast<ssize_t>(handle.size())) {
    std::perror("structkv: getrandom");
    std::abort();
  }
  return handle;
}

}  // namespace structkv::transport
