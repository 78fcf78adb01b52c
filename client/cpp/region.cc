#include "structkv/region.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/gpu_memory.h"
#include "client/cpp/region_memory.h"
#include "client/cpp/registration.h"

namespace structkv::client {

absl::StatusOr<std::shared_ptr<Region>> Region::Create(const RegionOptions& wanted) {
  if (wanted.size_bytes == 0) {
    return absl::InvalidArgumentError("RegionOptions.size_bytes is 0; it must be 1 or more");
  }
  RegionOptions options = wanted;
  auto memory = options.kind == RegionKind::kGpu ? internal::MakeGpuMemory(&options)
                                                 : internal::MakeHostMemory(&options);
  if (!memory.ok()) return memory.status();
  return std::shared_ptr<Region>(new Region(options, *std::move(memory)));
}

absl::StatusOr<std::shared_ptr<Region>> Region::Adopt(const GpuAllocation& allocation,
                                                      const RegionOptions& wanted) {
  RegionOptions options = wanted;
  options.kind = RegionKind::kGpu;
  auto memory = internal::AdoptGpuMemory(allocation, &options);
  if (!memory.ok()) return memory.status();
  return std::shared_ptr<Region>(new Region(options, *std::move(memory)));
}

Region::Region(const RegionOptions& options, std::shared_ptr<internal::RegionMemory> memory)
    : options_(options), memory_(std::move(memory)), data_(memory_->data()) {}

Region::~Region() = default;

std::optional<uint64_t> Region::OffsetOf(absl::Span<const std::byte> bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(data_);
  const auto at = reinterpret_cast<uintptr_t>(bytes.data());
  if (bytes.empty() || at < begin || bytes.size() > size() || at - begin > size() - bytes.size()) {
    return std::nullopt;
  }
  return at - begin;
}

std::shared_ptr<const internal::GpuMemory> Region::gpu_memory() const {
  return memory_->gpu() == nullptr ? nullptr : memory_->gpu()->shared_from_this();
}

absl::Status Region::Record(void* stream) {
  if (memory_->gpu() != nullptr) return memory_->gpu()->Record(stream);
  return absl::FailedPreconditionError("Record: the region is memory of the host");
}

absl::Status Region::CheckRange(uint64_t offset_bytes, size_t bytes) const {
  if (bytes <= size() && offset_bytes <= size() - bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(bytes, " bytes at ", offset_bytes, " do not lie in the region's ", size()));
}

absl::Status Region::Write(uint64_t offset_bytes, absl::Span<const std::byte> from) {
  if (absl::Status status = CheckRange(offset_bytes, from.size()); !status.ok()) return status;
  if (memory_->gpu() != nullptr) {
    return memory_->gpu()->Copy(data_ + offset_bytes, from.data(), from.size());
  }
  if (!from.empty()) std::memcpy(data_ + offset_bytes, from.data(), from.size());
  return absl::OkStatus();
}

absl::Status Region::Read(uint64_t offset_bytes, absl::Span<std::byte> to) const {
  if (absl::Status status = CheckRange(offset_bytes, to.size()); !status.ok()) return status;
  if (memory_->gpu() != nullptr) {
    return memory_->gpu()->Copy(to.data(), data_ + offset_bytes, to.size());
  }
  if (!to.empty()) std::memcpy(to.data(), data_ + offset_bytes, to.size());
  return absl::OkStatus();
}

absl::StatusOr<std::string> Region::Register(const internal::RegionServer& server) {
  absl::MutexLock lock(&mutex_);
  std::unique_ptr<internal::Registration>& registration = registrations_[server.key()];
  if (registration != nullptr && registration->holds()) return registration->handle();
  if (options_.kind == RegionKind::kNamed && std::exchange(had_name_, true)) {
    return absl::FailedPreconditionError(
        "a region of kind kNamed can be registered once, and that was tried or has ended; create "
        "another one");
  }
  registration.reset();
  auto made = memory_->Register(server, options_);
  if (!made.ok()) {
    registrations_.erase(server.key());
    return made.status();
  }
  registration = *std::move(made);
  return registration->handle();
}

void Region::Forget(const internal::RegionServer& server, const std::string& handle) {
  absl::MutexLock lock(&mutex_);
  const auto found = registrations_.find(server.key());
  // Another thread may have registered it anew meanwhile.
  if (found == registrations_.end() || found->second->handle() != handle) return;
  if (options_.kind != RegionKind::kNamed) registrations_.erase(found);
}

}  // namespace structkv::client
