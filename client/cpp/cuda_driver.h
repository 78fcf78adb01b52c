// CUDA's driver, found at run time: a host without it runs, and says why it has no memory of a GPU.
// The driver and not the runtime, of which there are as many as libraries that have it built in:
// all of them use the driver's primary context, and its interface is the same for all versions.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/cpp/cuda_abi.h"

namespace structkv::client::internal {

// Thread-safe.
class CudaDriver {
 public:
  // Loads the library of that name or path, or takes the program itself where it is empty; it stays
  // loaded. FAILED_PRECONDITION where there is none, it lacks a function, or it finds no GPU.
  static absl::StatusOr<std::shared_ptr<const CudaDriver>> Load(const std::string& library);

  const cuda::Functions& call() const { return functions_; }

  // "`what`: CUDA's words", RESOURCE_EXHAUSTED where memory is short, else FAILED_PRECONDITION.
  absl::Status ToStatus(cuda::Result result, absl::string_view what) const;

 private:
  CudaDriver() = default;

  cuda::Functions functions_ = {};
};

// The primary context of a GPU, held as long as the object lives. Thread-safe.
class CudaDevice {
 public:
  // `ordinal`: as CUDA counts them in this process.
  static absl::StatusOr<std::shared_ptr<CudaDevice>> Open(const std::string& library, int ordinal);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  // Makes the context the calling thread's for as long as it lives.
  class Scope {
   public:
    explicit Scope(const CudaDevice& device) : call_(device.driver_->call()) {
      call_.context_push(device.context_);
    }
    ~Scope() {
      cuda::Context* popped = nullptr;
      call_.context_pop(&popped);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const cuda::Functions& call_;
  };

  const CudaDriver& driver() const { return *driver_; }
  const std::shared_ptr<const CudaDriver>& shared_driver() const { return driver_; }
  const cuda::Functions& call() const { return driver_->call(); }
  int ordinal() const { return ordinal_; }
  // 16 bytes.
  const std::string& uuid() const { return uuid_; }
  // Of its PCI bus, as cuDeviceGetPCIBusId writes it.
  const std::string& bus_id() const { return bus_id_; }

  // Makes the context the calling thread's for good.
  absl::Status MakeCurrent() const {
    return driver_->ToStatus(call().context_push(context_), "cuCtxPushCurrent");
  }
  // Its own, of copies; a cudaStream_t.
  cuda::Stream* stream() const { return stream_; }
  // Has it wait for the last record of `event`.
  absl::Status Wait(cuda::Event* event) const;
  absl::Status Record(cuda::Event* event, cuda::Stream* stream) const;
  // Copies between any two kinds of memory and waits for that. What writes `from` has run, or is
  // behind the last record of `after`, which may be null.
  absl::Status Copy(std::byte* to, const std::byte* from, size_t bytes, cuda::Event* after) const;
  // Whether it is an address in a GPU's memory.
  bool IsOnGpu(const std::byte* data) const;

 private:
  CudaDevice(std::shared_ptr<const CudaDriver> driver, int ordinal)
      : driver_(std::move(driver)), ordinal_(ordinal) {}

  const std::shared_ptr<const CudaDriver> driver_;
  const int ordinal_;
  cuda::Device device_ = 0;
  cuda::Context* context_ = nullptr;
  cuda::Stream* stream_ = nullptr;  // for copies
  std::string uuid_;
  std::string bus_id_;
};

}  // namespace structkv::client::internal
