// Memory of a GPU that a test's client exports: the bare protocol of region.proto, over CUDA's
// runtime (or the fake one). Shares nothing with client/cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "grpcpp/channel.h"
#include "structkv/v1/region.grpc.pb.h"
#include "tests/testing/prompt_data.h"
#include "tests/testing/shared_region.h"

namespace structkv::testkit {

// An allocation of its own, with pinned memory of the same size beside it, a stream and an event.
// Ends the program where CUDA fails.
class GpuRegion {
 public:
  explicit GpuRegion(uint64_t size, int gpu = 0);
  // Frees the memory.
  ~GpuRegion();
  GpuRegion(const GpuRegion&) = delete;
  GpuRegion& operator=(const GpuRegion&) = delete;

  uint64_t size() const { return size_; }
  const std::string& handle() const { return handle_; }

  // A request that describes it, as made by the process `exporter`.
  v1::RegisterRegionRequest Request(const std::string& exporter) const;
  // Registers it; handle() is its own from then on.
  grpc::Status Register(const std::shared_ptr<grpc::Channel>& channel, const std::string& exporter,
                        uint64_t lease_millis = 60'000);
  // The uses that are left; -1 where it is not registered.
  int64_t Unregister(const std::shared_ptr<grpc::Channel>& channel) const;
  // What the server says of it; REGION_STATE_UNSPECIFIED where it has closed it.
  v1::RegionState State(const std::shared_ptr<grpc::Channel>& channel) const;

  // Queues a copy of the file's bytes to the GPU and records the event behind it; does not wait.
  void Upload(const SharedFile& file);
  // Waits for the stream.
  void Synchronize() const;
  // Copies all back into the file, and waits.
  void Download(const SharedFile& file) const;

 private:
  const uint64_t size_;
  const int gpu_;
  void* device_ = nullptr;
  void* pinned_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t event_ = nullptr;
  std::string handle_;
};

// A prompt whose keys and values lie in a GPU's memory, and its results where `results`; everything
// else travels in messages.
class GpuPrompt {
 public:
  GpuPrompt(const PromptData& data, bool results, int gpu = 0);

  GpuRegion& region() { return region_; }
  // The prompt's messages, with the region's handle; its tensors are on their way to the GPU.
  std::vector<v1::CompressRequest> Messages();
  // The answers with data in the place of ranges.
  Outcome Get(Outcome outcome) const;

 private:
  const PromptData& data_;
  const bool results_;
  std::unique_ptr<SharedFile> file_;  // where the bytes come from, and go to; not shared
  std::unique_ptr<RangedPrompt> ranged_;
  GpuRegion region_;
};

}  // namespace structkv::testkit
