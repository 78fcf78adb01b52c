// Memory that this process shares with a server on the same host: of the host, or of a GPU.
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
#include <set>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace structkv::client {

namespace internal {
class GpuMemory;
class RegionMemory;
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
  // Memory of a GPU, an allocation of its own, which the server opens by CUDA IPC. A thread renews
  // its lease. CUDA is found at run time, and needed for nothing else.
  kGpu,
};

struct RegionOptions {
  // 1 or more. Rounded up to whole pages; of a GPU to multiples of 2 MiB, since CUDA shares no
  // less.
  size_t size_bytes = 0;
  RegionKind kind = RegionKind::kDescriptor;
  // Whether the server may write results into it.
  bool writable = true;
  // Take all pages at once: the first touch of a fresh page costs more than a copy of its bytes.
  // Not of a GPU.
  bool prefault = true;
  // Ask for huge pages; a kernel that gives none to shared memory ignores it. Not of a GPU.
  bool huge_pages = false;
  // kNamed, kGpu: how long the server keeps it after the last renewal; zero: the server's default
  // or, of a GPU, 30 seconds.
  absl::Duration lease;
  // How long a server may go on with the region once nothing is heard of it any more, that is once
  // the lease has ended or, of kDescriptor, the connection: it ends the streams of a client that is
  // gone within that time. Until then rooms of prompts that failed are not given out again, and
  // memory of a GPU, unless the server says that it has closed it, is kept.
  absl::Duration quarantine = absl::Minutes(1);

  // Of a GPU alone:
  // Its number, as CUDA counts them in this process.
  int gpu = 0;
  // A name or path of CUDA's driver; empty: the program itself, which is linked with it.
  std::string cuda_library = "libcuda.so.1";
};

// An allocation of cudaMalloc that the program has made itself, whole. (Memory of cudaMallocAsync
// and of virtual memory management cannot be shared.)
struct GpuAllocation {
  void* data = nullptr;  // its begin
  // Keeps it; released once no server has it open any more, on any thread. Null: it is never freed.
  std::shared_ptr<const void> owner;
};

// Thread-safe. Sessions and blocks of an Arena hold what they use; the memory is unmapped, and the
// servers let go of it, with the last of them.
//
// Memory of a GPU is freed once every server that it was registered with has closed it, which may
// be later: while prompts use it there, or until its lease has ended where the server does not
// answer (RegionOptions.quarantine). The library never touches its bytes but by CUDA's copies. The
// memory of a process that ends is gone at once, so end prompts before.
//
// Processes: neither memory nor descriptors outlive an exec. A forked child does not have the
// memory, and must not use the object; until it ends or execs, it keeps the registrations of a
// parent that was killed.
class Region {
 public:
  // INVALID_ARGUMENT where the size is 0; RESOURCE_EXHAUSTED, with the numbers, where there is no
  // such room.
  // Of a GPU also FAILED_PRECONDITION, with CUDA's words: there is no driver, or no such GPU.
  static absl::StatusOr<std::shared_ptr<Region>> Create(const RegionOptions& options);
  // A region of the program's own memory of the GPU `options.gpu`; of `options` those of kGpu
  // count, and `writable`. INVALID_ARGUMENT where it is no allocation's begin, or another GPU's.
  static absl::StatusOr<std::shared_ptr<Region>> Adopt(const GpuAllocation& allocation,
                                                       const RegionOptions& options);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Zeros at first, and aligned to a page; of a GPU an address there, and whatever lay there.
  std::byte* data() const { return data_; }
  size_t size() const { return options_.size_bytes; }
  const RegionOptions& options() const { return options_; }
  bool on_gpu() const { return options_.kind == RegionKind::kGpu; }

  // Of a GPU: has servers wait for what was queued on `stream`, a cudaStream_t, until now, before
  // they read the region. Call it behind the kernels that write a layer, before the layer is sent
  // (LayerTensors.cuda_stream does both). What was recorded before, on whatever stream, is waited
  // for as well. So each record puts off all that is read of the region from then on: where records
  // follow each other without a pause, or one is never reached, the server gives up after 5 seconds
  // (DEADLINE_EXCEEDED). FAILED_PRECONDITION for memory of the host, and with CUDA's words.
  absl::Status Record(void* stream);
  // Copy between the host's memory and the region's, and wait for that; for either kind. Of a GPU
  // they begin behind the last Record(). INVALID_ARGUMENT where it does not lie in the region.
  absl::Status Write(uint64_t offset_bytes, absl::Span<const std::byte> from);
  absl::Status Read(uint64_t offset_bytes, absl::Span<std::byte> to) const;

  // Whether `data` is an address in some GPU's memory, by the CUDA of this region: then no thread
  // may read it but by CUDA's copies. False for memory of the host.
  bool IsOnGpu(const std::byte* data) const;

  // Where `bytes`, which must not be empty, begin in the region; nullopt: not all of them lie in
  // it.
  std::optional<uint64_t> OffsetOf(absl::Span<const std::byte> bytes) const;

  // For Client, which calls it: registers at `server`, unless it is registered there and that
  // holds, within 10 seconds and until `deadline`. Its handle. Errors: Client::Register().
  absl::StatusOr<std::string> Register(const internal::RegionServer& server, absl::Time deadline);
  // Drops the registration at `server` that is known as `handle`, if it is there still: the server
  // does not know it.
  void Forget(const internal::RegionServer& server, const std::string& handle);
  // Whether it is registered at `server` as `handle`, and that holds as far as this side knows.
  bool IsRegistered(const internal::RegionServer& server, const std::string& handle);
  // Null: memory of the host.
  std::shared_ptr<const internal::GpuMemory> gpu_memory() const;

 private:
  Region(const RegionOptions& options, std::shared_ptr<internal::RegionMemory> memory);
  struct Registered {
    std::unique_ptr<internal::Registration> registration;
    std::weak_ptr<const void> client;
  };
  // Whether `size` bytes from there on lie in the region.
  absl::Status CheckRange(uint64_t offset_bytes, size_t size) const;

  const RegionOptions options_;
  const std::shared_ptr<internal::RegionMemory> memory_;
  std::byte* const data_;
  absl::Mutex mutex_;
  bool had_name_ ABSL_GUARDED_BY(mutex_) = false;  // kNamed
  // By the server's key:
  std::map<std::string, Registered> registrations_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string> registering_ ABSL_GUARDED_BY(mutex_);  // a thread is at it
};

}  // namespace structkv::client
