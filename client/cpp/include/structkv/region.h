// Memory that this process shares with a server on the same host.
//
//   auto region = structkv::client::Region::Create({.size_bytes = size_t{4} << 30});
//   auto arena = std::make_shared<structkv::client::Arena>(*region);   // arena.h
//   options.regions = {*region};                                       // SessionOptions
//
// Keys and values that lie in a region are read by the server where they lie, and results are
// written into one (PromptOptions.results). docs/transports.md says what that needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace structkv::client {

namespace internal {
class Registration;
struct RegionServer;
}  // namespace internal

enum class RegionKind : uint8_t {
  // A sealed memfd, whose descriptor goes to the server over its region socket. Registered as long
  // as the object lives and the process too, whatever ends it.
  kDescriptor,
  // A file of /dev/shm, registered by its name, for where a descriptor cannot be passed. It has a
  // name only while it is being registered. A thread renews its lease. It can be registered once.
  kNamed,
};

struct RegionOptions {
  // 1 or more. Rounded up to whole pages.
  size_t size_bytes = 0;
  RegionKind kind = RegionKind::kDescriptor;
  // Whether the server may write results into it.
  bool writable = true;
  // Take all pages at once: the first touch of a fresh page costs more than a copy of its bytes.
  bool prefault = true;
  // Ask for huge pages; a kernel that gives none to shared memory ignores it.
  bool huge_pages = false;
  // kNamed: how long the server keeps it after the last renewal; zero: the server's default.
  absl::Duration lease;
};

// Thread-safe. Sessions and blocks of an Arena hold what they use; the memory is unmapped, and the
// servers let go of it, with the last of them.
//
// Processes: neither memory nor descriptors outlive an exec. A forked child does not have the
// memory, and must not use the object; until it ends or execs, it keeps the registrations of a
// parent that was killed.
class Region {
 public:
  // INVALID_ARGUMENT where the size is 0; RESOURCE_EXHAUSTED, with the numbers, where there is no
  // such room.
  static absl::StatusOr<std::shared_ptr<Region>> Create(const RegionOptions& options);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Zeros at first; aligned to a page.
  std::byte* data() const { return data_; }
  size_t size() const { return options_.size_bytes; }
  const RegionOptions& options() const { return options_; }
  // Where `bytes`, which must not be empty, begin in the region; nullopt: not all of them lie in
  // it.
  std::optional<uint64_t> OffsetOf(absl::Span<const std::byte> bytes) const;

  // For Client, which calls it: registers at `server`, unless it is registered there and that
  // holds. Its handle. Errors: Client::Register().
  absl::StatusOr<std::string> Register(const internal::RegionServer& server);
  // Drops the registration at `server`, if there is one: it is known to be gone.
  void Forget(const internal::RegionServer& server);

 private:
  Region(const RegionOptions& options, int descriptor, std::byte* data);

  const RegionOptions options_;
  const int descriptor_;
  std::byte* const data_;
  const int64_t process_;  // that created it
  absl::Mutex mutex_;
  bool had_name_ ABSL_GUARDED_BY(mutex_) = false;  // kNamed
  // By server.
  std::map<std::string, std::unique_ptr<internal::Registration>> registrations_
      ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::client
