#include "kernels/imported_memory.h"

#include <sys/random.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"

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

absl::StatusOr<std::unique_ptr<ImportedMemory>> Backend::Import(
    const ExportedMemory& /*exported*/) const {
  return absl::FailedPreconditionError(
      absl::StrCat("the backend ", std::string(name()), " computes in the host's memory"));
}

absl::StatusOr<std::shared_ptr<std::byte>> Backend::Reserve(int gpu, int64_t /*bytes*/) const {
  return absl::FailedPreconditionError(
      absl::StrCat("the backend ", std::string(name()), " does not compute on GPU ", gpu));
}

}  // namespace structkv
