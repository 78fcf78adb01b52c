// Memory that is a sealed memfd, or an unnamed file of /dev/shm.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/region_memory.h"

namespace structkv::client::internal {
namespace {

constexpr char kSharedMemoryDirectory[] = "/dev/shm";

absl::Status Failed(const char* what, const RegionOptions& options) {
  const int error = errno;
  const std::string text =
      absl::StrCat("a region of ", options.size_bytes, " bytes: ", what, ": ", strerror(error));
  switch (error) {
    case ENOSPC:
    case ENOMEM:
    case EFBIG:
    case EMFILE:
    case ENFILE:
      return absl::ResourceExhaustedError(text);
    default:
      return absl::FailedPreconditionError(text);
  }
}

// A descriptor, or -1 and errno.
int OpenMemory(RegionKind kind) {
  if (kind == RegionKind::kDescriptor) {
    return memfd_create("structkv", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  }
  return open(kSharedMemoryDirectory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
}

// Touches every page for writing.
absl::Status Prefault(std::byte* data, const RegionOptions& options) {
#ifdef MADV_POPULATE_WRITE
  if (madvise(data, options.size_bytes, MADV_POPULATE_WRITE) == 0) return absl::OkStatus();
  if (errno != EINVAL) return Failed("populating", options);  // EINVAL: a kernel before 5.14
#endif
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (size_t at = 0; at < options.size_bytes; at += page) {
    *const_cast<volatile std::byte*>(data + at) = std::byte{0};
  }
  return absl::OkStatus();
}

struct HostMemory final : RegionMemory {
  explicit HostMemory(size_t size_in) : size(size_in) {}
  ~HostMemory() override {
    if (descriptor >= 0) close(descriptor);
    // A forked child may have mapped something else there.
    if (mapped != MAP_FAILED && process == getpid()) munmap(mapped, size);
  }

  std::byte* data() const override { return static_cast<std::byte*>(mapped); }
  absl::StatusOr<std::unique_ptr<Registration>> Register(const RegionServer& server,
                                                         const RegionOptions& options,
                                                         absl::Time deadline) override {
    return options.kind == RegionKind::kNamed
               ? RegisterNamed(server, options, descriptor, deadline)
               : RegisterDescriptor(server, options, descriptor, deadline);
  }

  const size_t size;
  const pid_t process = getpid();  // that created it
  int descriptor = -1;
  void* mapped = MAP_FAILED;
};

}  // namespace

absl::StatusOr<std::shared_ptr<RegionMemory>> MakeHostMemory(RegionOptions* options) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // A memfd has no limit of its own: taking more pages than there are would end the process.
  const size_t installed = page * static_cast<size_t>(sysconf(_SC_PHYS_PAGES));
  if (options->size_bytes > installed) {
    return absl::ResourceExhaustedError(absl::StrCat("RegionOptions.size_bytes is ",
                                                     options->size_bytes, "; this machine has ",
                                                     installed, " bytes of memory"));
  }
  options->size_bytes = (options->size_bytes + page - 1) / page * page;
  auto memory = std::make_shared<HostMemory>(options->size_bytes);
  memory->descriptor = OpenMemory(options->kind);
  if (memory->descriptor < 0) return Failed("no shared memory", *options);
  const auto size = static_cast<off_t>(options->size_bytes);
  if (ftruncate(memory->descriptor, size) != 0) return Failed("setting its size", *options);
  // /dev/shm is limited: what cannot be had must be an error here, not a signal at the first touch.
  if (options->kind == RegionKind::kNamed && fallocate(memory->descriptor, 0, 0, size) != 0) {
    return Failed("taking its pages in /dev/shm", *options);
  }
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  if (options->kind == RegionKind::kDescriptor &&
      fcntl(memory->descriptor, F_ADD_SEALS, seals) != 0) {
    return Failed("sealing", *options);
  }
  memory->mapped =
      mmap(nullptr, options->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory->descriptor, 0);
  if (memory->mapped == MAP_FAILED) return Failed("mapping", *options);
  auto* data = static_cast<std::byte*>(memory->mapped);
  if (madvise(data, options->size_bytes, MADV_DONTFORK) != 0) return Failed("mapping", *options);
  if (options->huge_pages) madvise(data, options->size_bytes, MADV_HUGEPAGE);
  if (options->prefault) {
    if (absl::Status status = Prefault(data, *options); !status.ok()) return status;
  }
  return memory;
}

}  // namespace structkv::client::internal
