#include "structkv/region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/registration.h"

namespace structkv::client {
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

// Of a region that is made: gives back what it has so far, unless it is let go.
struct Parts {
  ~Parts() {
    if (data != MAP_FAILED) munmap(data, size);
    if (descriptor >= 0) close(descriptor);
  }
  size_t size = 0;
  int descriptor = -1;
  void* data = MAP_FAILED;
};

}  // namespace

absl::StatusOr<std::shared_ptr<Region>> Region::Create(const RegionOptions& wanted) {
  if (wanted.size_bytes == 0) {
    return absl::InvalidArgumentError("RegionOptions.size_bytes is 0; it must be 1 or more");
  }
  RegionOptions options = wanted;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // A memfd has no limit of its own: taking more pages than there are would end the process.
  const size_t memory = page * static_cast<size_t>(sysconf(_SC_PHYS_PAGES));
  if (options.size_bytes > memory) {
    return absl::ResourceExhaustedError(absl::StrCat("RegionOptions.size_bytes is ",
                                                     options.size_bytes, "; this machine has ",
                                                     memory, " bytes of memory"));
  }
  options.size_bytes = (options.size_bytes + page - 1) / page * page;
  Parts parts;
  parts.size = options.size_bytes;
  parts.descriptor = OpenMemory(options.kind);
  if (parts.descriptor < 0) return Failed("no shared memory", options);
  const auto size = static_cast<off_t>(options.size_bytes);
  if (ftruncate(parts.descriptor, size) != 0) return Failed("setting its size", options);
  // /dev/shm is limited: what cannot be had must be an error here, not a signal at the first touch.
  if (options.kind == RegionKind::kNamed && fallocate(parts.descriptor, 0, 0, size) != 0) {
    return Failed("taking its pages in /dev/shm", options);
  }
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  if (options.kind == RegionKind::kDescriptor && fcntl(parts.descriptor, F_ADD_SEALS, seals) != 0) {
    return Failed("sealing", options);
  }
  parts.data =
      mmap(nullptr, options.size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, parts.descriptor, 0);
  if (parts.data == MAP_FAILED) return Failed("mapping", options);
  auto* data = static_cast<std::byte*>(parts.data);
  if (madvise(data, options.size_bytes, MADV_DONTFORK) != 0) return Failed("mapping", options);
  if (options.huge_pages) madvise(data, options.size_bytes, MADV_HUGEPAGE);
  if (options.prefault) {
    if (absl::Status status = Prefault(data, options); !status.ok()) return status;
  }
  std::shared_ptr<Region> region(new Region(options, parts.descriptor, data));
  parts.descriptor = -1;
  parts.data = MAP_FAILED;
  return region;
}

Region::Region(const RegionOptions& options, int descriptor, std::byte* data)
    : options_(options), descriptor_(descriptor), data_(data), process_(getpid()) {}

Region::~Region() {
  {
    absl::MutexLock lock(&mutex_);
    registrations_.clear();
  }
  close(descriptor_);
  // A forked child may have mapped something else there.
  if (process_ == getpid()) munmap(data_, options_.size_bytes);
}

std::optional<uint64_t> Region::OffsetOf(absl::Span<const std::byte> bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(data_);
  const auto at = reinterpret_cast<uintptr_t>(bytes.data());
  if (bytes.empty() || at < begin || bytes.size() > size() || at - begin > size() - bytes.size()) {
    return std::nullopt;
  }
  return at - begin;
}

absl::StatusOr<std::string> Region::Register(const internal::RegionServer& server) {
  absl::MutexLock lock(&mutex_);
  std::unique_ptr<internal::Registration>& registration = registrations_[server.key()];
  if (registration != nullptr && registration->holds()) return registration->handle();
  const bool named = options_.kind == RegionKind::kNamed;
  if (named && std::exchange(had_name_, true)) {
    return absl::FailedPreconditionError(
        "a region of kind kNamed can be registered once, and that was tried or has ended; create "
        "another one");
  }
  registration.reset();
  auto made = named ? internal::RegisterNamed(server, options_, descriptor_)
                    : internal::RegisterDescriptor(server, options_, descriptor_);
  if (!made.ok()) {
    registrations_.erase(server.key());
    return made.status();
  }
  registration = *std::move(made);
  return registration->handle();
}

void Region::Forget(const internal::RegionServer& server) {
  absl::MutexLock lock(&mutex_);
  if (options_.kind != RegionKind::kNamed) registrations_.erase(server.key());
}

}  // namespace structkv::client
