#include "structkv/region.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/gpu_memory.h"
#include "client/cpp/region_call.h"
#include "client/cpp/region_memory.h"
#include "client/cpp/registration.h"

namespace structkv::client {
namespace {

// Its end may have to wait for a server that is away.
void DropElsewhere(std::unique_ptr<internal::Registration> registration) {
  std::thread([ended = std::move(registration)] {}).detach();
}

}  // namespace

std::string internal::RegionServer::key(RegionKind kind) const {
  const void* const whose = kind == RegionKind::kDescriptor ? nullptr : channel.get();
  return absl::StrCat(absl::Hex(reinterpret_cast<uintptr_t>(whose)), " ", tenant, " ", caller, " ",
                      socket);
}

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

bool Region::IsOnGpu(const std::byte* data) const {
  return memory_->gpu() != nullptr && memory_->gpu()->device().IsOnGpu(data);
}

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

absl::StatusOr<std::string> Region::Register(const internal::RegionServer& server,
                                             absl::Time deadline) {
  deadline = std::min(deadline, absl::Now() + internal::kRegionCallLimit);
  const std::string key = server.key(options_.kind);
  {
    absl::MutexLock lock(&mutex_);
    const auto is_idle = [&] {
      mutex_.AssertReaderHeld();
      return !registering_.contains(key);
    };
    if (!mutex_.AwaitWithDeadline(absl::Condition(&is_idle), deadline)) {
      return absl::UnavailableError("the region is still being registered by another thread");
    }
    const auto found = registrations_.find(key);
    if (found != registrations_.end() && found->second.registration->holds()) {
      // Of clients that share it, one that lives keeps it.
      if (found->second.client.expired()) found->second.client = server.client;
      return found->second.registration->handle();
    }
    if (options_.kind == RegionKind::kNamed && std::exchange(had_name_, true)) {
      return absl::FailedPreconditionError(
          "a region of kind kNamed can be registered once, and that was tried or has ended; create "
          "another one");
    }
    registering_.insert(key);
    for (auto it = registrations_.begin(); it != registrations_.end();) {
      const bool ended = it->first == key || it->second.client.expired();
      if (ended) DropElsewhere(std::move(it->second.registration));
      it = ended ? registrations_.erase(it) : std::next(it);
    }
  }
  auto made = memory_->Register(server, options_, deadline);
  absl::MutexLock lock(&mutex_);
  registering_.erase(key);
  if (!made.ok()) return made.status();
  std::string handle = (*made)->handle();
  registrations_[key] = {*std::move(made), server.client};
  return handle;
}

bool Region::IsRegistered(const internal::RegionServer& server, const std::string& handle) {
  absl::MutexLock lock(&mutex_);
  const auto found = registrations_.find(server.key(options_.kind));
  return found != registrations_.end() && found->second.registration->handle() == handle &&
         found->second.registration->holds();
}

void Region::Forget(const internal::RegionServer& server, const std::string& handle) {
  absl::MutexLock lock(&mutex_);
  const auto found = registrations_.find(server.key(options_.kind));
  // Another thread may have registered it anew meanwhile.
  if (found == registrations_.end() || found->second.registration->handle() != handle) return;
  if (options_.kind == RegionKind::kNamed) return;
  DropElsewhere(std::move(found->second.registration));
  registrations_.erase(found);
}

}  // namespace structkv::client
