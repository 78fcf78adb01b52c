#include "service/transport/region_registry.h"

#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "service/transport/mapping.h"

namespace structkv::transport {
namespace {

absl::Status NotFound(const std::string& handle) {
  return absl::NotFoundError(absl::StrCat(
      "the region ", absl::BytesToHexString(handle.substr(0, 4)), "... is not registered"));
}

absl::Status CheckLease(absl::Duration lease, absl::Duration max) {
  if (lease >= kMinLease && lease <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("lease_millis is ",
                                                 absl::ToInt64Milliseconds(lease), "; ",
                                                 absl::ToInt64Milliseconds(kMinLease), " to ",
                                                 absl::ToInt64Milliseconds(max), " are allowed"));
}

}  // namespace

absl::Duration LeaseOf(uint64_t millis) {
  const bool fits = millis <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  return fits ? absl::Milliseconds(static_cast<int64_t>(millis)) : absl::InfiniteDuration();
}

struct RegionRegistry::Region {
  std::string handle;
  std::string tenant;
  std::string owner;
  int64_t connection = 0;
  int64_t size = 0;
  // Under the mutex, but for whoever is counted as a use:
  std::unique_ptr<RegionMemory> memory;  // null: it is being unmapped
  std::optional<Clock::Time> expires;
  bool leaving = false;  // unregistered
  int64_t uses = 0;
};

// What regions' uses share with the registry.
class RegionRegistry::State {
 public:
  using RegionPtr = std::shared_ptr<Region>;

  explicit State(RegionOptions options_in) : options(std::move(options_in)) {}

  absl::Status Check(const NewRegion& wanted) const {
    const auto most = static_cast<uint64_t>(options.max_bytes);
    if (wanted.size_bytes < 1 || wanted.size_bytes > most) {
      return absl::InvalidArgumentError(absl::StrCat("size_bytes is ", wanted.size_bytes, "; 1 to ",
                                                     most, " (the server's limit) are allowed"));
    }
    if (!wanted.lease.has_value()) return absl::OkStatus();
    return CheckLease(*wanted.lease, options.max_lease);
  }

  absl::StatusOr<RegisteredRegion> Add(std::unique_ptr<RegionMemory> memory,
                                       const NewRegion& wanted) {
    auto region = std::make_shared<Region>();
    region->handle = NewHandle();
    region->tenant = wanted.tenant;
    region->owner = wanted.owner;
    region->connection = wanted.connection;
    region->size = static_cast<int64_t>(wanted.size_bytes);
    region->memory = std::move(memory);
    if (wanted.lease.has_value()) {
      region->expires = options.clock->Now() + absl::ToChronoNanoseconds(*wanted.lease);
    }
    const std::lock_guard lock(mutex);
    if (static_cast<int64_t>(regions.size()) >= options.max_regions) {
      return absl::ResourceExhaustedError(absl::StrCat(regions.size(), " regions are registered; ",
                                                       options.max_regions, " are allowed"));
    }
    if (region->size > options.max_bytes - mapped_bytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("size_bytes is ", wanted.size_bytes, ", and regions of ", mapped_bytes,
                       " bytes are mapped; ", options.max_bytes, " are allowed together"));
    }
    mapped_bytes += region->size;
    regions.emplace(region->handle, region);
    return RegisteredRegion{region->handle, wanted.lease};
  }

  // Under the mutex. Null: there is none of that tenant.
  RegionPtr Find(const std::string& handle, const std::string& tenant) const {
    const auto found = regions.find(handle);
    if (found == regions.end() || found->second->tenant != tenant) return nullptr;
    return found->second;
  }

  // A region on its way out: its memory goes without the lock held, since that takes time, and then
  // the region, so that whoever no longer finds it knows that the memory was let go of.
  class Leaving {
   public:
    Leaving(State* state, RegionPtr region)
        : state_(state), region_(std::move(region)), memory_(std::move(region_->memory)) {}
    Leaving(const Leaving&) = delete;
    Leaving& operator=(const Leaving&) = delete;
    ~Leaving() {
      memory_.reset();
      const std::lock_guard lock(state_->mutex);
      state_->mapped_bytes -= region_->size;
      state_->regions.erase(region_->handle);
    }

   private:
    State* const state_;
    const RegionPtr region_;
    std::unique_ptr<RegionMemory> memory_;
  };

  // Under the mutex. What the caller lets go of once it has unlocked; null while the region is in
  // use, or where somebody else lets go of it.
  std::unique_ptr<Leaving> Leave(const RegionPtr& region) {
    region->leaving = true;
    if (region->uses > 0 || region->memory == nullptr) return nullptr;
    return std::make_unique<Leaving>(this, region);
  }

  // Under the mutex. Being unmapped is one.
  static int64_t Uses(const Region& region) { return region.memory == nullptr ? 1 : region.uses; }

  // How many those were.
  template <typename Which>
  int64_t LeaveAll(Which which) {
    std::vector<std::unique_ptr<Leaving>> gone;
    const std::lock_guard lock(mutex);
    for (const auto& [handle, region] : regions) {
      if (!region->leaving && which(*region)) gone.push_back(Leave(region));
    }
    return static_cast<int64_t>(gone.size());
  }

  const RegionOptions options;
  mutable std::mutex mutex;
  absl::flat_hash_map<std::string, RegionPtr> regions;  // by handle
  int64_t mapped_bytes = 0;
  std::atomic<int64_t> expired{0};
};

struct RegionUse::Parts {
  std::shared_ptr<RegionRegistry::State> state;
  std::shared_ptr<RegionRegistry::Region> region;
};

RegionUse::RegionUse(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

RegionUse::~RegionUse() {
  std::unique_ptr<RegionRegistry::State::Leaving> gone;
  const std::lock_guard lock(parts_->state->mutex);
  --parts_->region->uses;
  if (parts_->region->leaving) gone = parts_->state->Leave(parts_->region);
}

const RegionMemory& RegionUse::memory() const { return *parts_->region->memory; }

RegionRegistry::RegionRegistry(RegionOptions options)
    : state_(std::make_shared<State>(std::move(options))) {}
RegionRegistry::~RegionRegistry() = default;

absl::StatusOr<RegisteredRegion> RegionRegistry::AddDescriptor(FileDescriptor file,
                                                               const NewRegion& wanted) {
  if (absl::Status valid = state_->Check(wanted); !valid.ok()) return valid;
  const auto size = static_cast<int64_t>(wanted.size_bytes);
  if (absl::Status fits = CheckDescriptor(file.get(), size); !fits.ok()) return fits;
  absl::StatusOr<std::unique_ptr<Mapping>> mapping =
      Mapping::Map(std::move(file), size, wanted.writable, /*sealed=*/true);
  if (!mapping.ok()) return mapping.status();
  return state_->Add(*std::move(mapping), wanted);
}

absl::StatusOr<RegisteredRegion> RegionRegistry::AddMemory(OpenMemory open,
                                                           const NewRegion& wanted) {
  NewRegion region = wanted;
  if (!region.lease.has_value()) region.lease = options().lease;
  if (absl::Status valid = state_->Check(region); !valid.ok()) return valid;
  absl::StatusOr<std::unique_ptr<RegionMemory>> memory = open();
  if (!memory.ok()) return memory.status();
  if (const auto gpu = (*memory)->gpu()) region.owner = absl::StrCat("GPU ", *gpu);
  return state_->Add(*std::move(memory), region);
}

absl::StatusOr<RegisteredRegion> RegionRegistry::AddName(const std::string& name,
                                                         const NewRegion& wanted) {
  NewRegion region = wanted;
  if (!region.lease.has_value()) region.lease = options().lease;
  if (absl::Status valid = state_->Check(region); !valid.ok()) return valid;
  const auto size = static_cast<int64_t>(region.size_bytes);
  absl::StatusOr<NamedFile> named = OpenNamed(options().directory, name, size, region.writable);
  if (!named.ok()) return named.status();
  region.owner = absl::StrCat("uid ", named->owner);
  const FileDescriptor file(fcntl(named->file.get(), F_DUPFD_CLOEXEC, 0));
  if (!file.valid()) {
    return absl::ResourceExhaustedError(
        absl::StrCat(name, ": the server has no descriptor left for it"));
  }
  absl::StatusOr<std::unique_ptr<Mapping>> mapping =
      Mapping::Map(std::move(named->file), size, region.writable, /*sealed=*/false);
  if (!mapping.ok()) return mapping.status();
  absl::StatusOr<RegisteredRegion> added = state_->Add(*std::move(mapping), region);
  if (!added.ok()) return added.status();
  absl::Status removed = RemoveName(options().directory, name, file.get());
  if (removed.ok()) return added;
  Unregister(added->handle, region.tenant).status().IgnoreError();
  return removed;
}

absl::StatusOr<RegionInfo> RegionRegistry::Get(const std::string& handle,
                                               const std::string& tenant) const {
  const std::lock_guard lock(state_->mutex);
  const State::RegionPtr region = state_->Find(handle, tenant);
  if (region == nullptr) return NotFound(handle);
  RegionInfo info;
  info.size_bytes = region->size;
  info.unregistering = region->leaving;
  info.uses = State::Uses(*region);
  info.owner = region->owner;
  if (region->expires.has_value()) {
    info.lease_left =
        std::max(absl::ZeroDuration(), absl::FromChrono(*region->expires - options().clock->Now()));
  }
  if (region->memory == nullptr) return info;
  info.writable = region->memory->writable();
  info.broken = !region->memory->Check().ok();
  return info;
}

absl::StatusOr<std::optional<absl::Duration>> RegionRegistry::Renew(
    const std::string& handle, const std::string& tenant, std::optional<absl::Duration> lease) {
  const absl::Duration wanted = lease.value_or(options().lease);
  if (absl::Status valid = CheckLease(wanted, options().max_lease); !valid.ok()) return valid;
  const std::lock_guard lock(state_->mutex);
  const State::RegionPtr region = state_->Find(handle, tenant);
  if (region == nullptr || region->leaving) return NotFound(handle);
  if (!lease.has_value() && !region->expires.has_value()) return lease;
  region->expires = options().clock->Now() + absl::ToChronoNanoseconds(wanted);
  return wanted;
}

absl::StatusOr<int64_t> RegionRegistry::Unregister(const std::string& handle,
                                                   const std::string& tenant) {
  std::unique_ptr<State::Leaving> gone;
  const std::lock_guard lock(state_->mutex);
  const State::RegionPtr region = state_->Find(handle, tenant);
  if (region == nullptr) return NotFound(handle);
  gone = state_->Leave(region);
  return gone != nullptr ? 0 : State::Uses(*region);
}

absl::StatusOr<std::shared_ptr<const RegionUse>> RegionRegistry::Use(const std::string& handle,
                                                                     const std::string& tenant) {
  auto parts = std::make_unique<RegionUse::Parts>();
  {
    const std::lock_guard lock(state_->mutex);
    const State::RegionPtr region = state_->Find(handle, tenant);
    if (region == nullptr || region->leaving) return NotFound(handle);
    ++region->uses;
    parts->region = region;
    parts->state = state_;
  }
  std::shared_ptr<const RegionUse> use(new RegionUse(std::move(parts)));
  if (absl::Status whole = use->memory().Check(); !whole.ok()) return whole;
  return use;
}

void RegionRegistry::EndConnection(int64_t connection) {
  state_->LeaveAll([connection](const Region& region) { return region.connection == connection; });
}

void RegionRegistry::Expire() {
  state_->expired += state_->LeaveAll([now = options().clock->Now()](const Region& region) {
    return region.expires.has_value() && *region.expires <= now;
  });
}

int64_t RegionRegistry::RegionsOf(int64_t connection) const {
  const std::lock_guard lock(state_->mutex);
  return std::count_if(state_->regions.begin(), state_->regions.end(),
                       [connection](const auto& entry) {
                         return entry.second->connection == connection && !entry.second->leaving;
                       });
}

int64_t RegionRegistry::mapped_bytes() const {
  const std::lock_guard lock(state_->mutex);
  return state_->mapped_bytes;
}

int64_t RegionRegistry::expired() const { return state_->expired; }

int64_t RegionRegistry::regions() const {
  const std::lock_guard lock(state_->mutex);
  return static_cast<int64_t>(state_->regions.size());
}

const RegionOptions& RegionRegistry::options() const { return state_->options; }

}  // namespace structkv::transport
