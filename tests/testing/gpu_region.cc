#include "tests/testing/gpu_region.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace structkv::testkit {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::abort();
}

template <class Bytes>
std::string AsString(const Bytes& bytes) {
  return std::string(reinterpret_cast<const char*>(&bytes), sizeof(bytes));
}

}  // namespace

GpuRegion::GpuRegion(uint64_t size, int gpu) : size_(size), gpu_(gpu) {
  Check(cudaSetDevice(gpu), "cudaSetDevice");
  Check(cudaMalloc(&device_, size), "cudaMalloc");
  Check(cudaHostAlloc(&pinned_, size, cudaHostAllocPortable), "cudaHostAlloc");
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  Check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming | cudaEventInterprocess),
        "cudaEventCreateWithFlags");
}

GpuRegion::~GpuRegion() {
  Check(cudaStreamDestroy(stream_), "cudaStreamDestroy");
  Check(cudaEventDestroy(event_), "cudaEventDestroy");
  Check(cudaFreeHost(pinned_), "cudaFreeHost");
  Check(cudaFree(device_), "cudaFree");
}

v1::RegisterRegionRequest GpuRegion::Request(const std::string& exporter) const {
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, gpu_), "cudaGetDeviceProperties");
  cudaIpcMemHandle_t memory;
  Check(cudaIpcGetMemHandle(&memory, device_), "cudaIpcGetMemHandle");
  cudaIpcEventHandle_t event;
  Check(cudaIpcGetEventHandle(&event, event_), "cudaIpcGetEventHandle");
  v1::RegisterRegionRequest request;
  request.set_size_bytes(size_);
  request.set_writable(true);
  v1::CudaIpcMemory* exported = request.mutable_cuda_ipc();
  exported->set_memory_handle(AsString(memory));
  exported->set_event_handle(AsString(event));
  exported->set_device_uuid(AsString(properties.uuid));
  exported->set_exporter_id(exporter);
  exported->set_base_address(reinterpret_cast<uint64_t>(device_));
  exported->set_event_address(reinterpret_cast<uint64_t>(event_));
  return request;
}

grpc::Status GpuRegion::Register(const std::shared_ptr<grpc::Channel>& channel,
                                 const std::string& exporter, uint64_t lease_millis) {
  v1::RegisterRegionRequest request = Request(exporter);
  request.set_lease_millis(lease_millis);
  grpc::ClientContext context;
  v1::RegisterRegionResponse response;
  grpc::Status status = v1::Regions::NewStub(channel)->RegisterRegion(&context, request, &response);
  handle_ = response.handle();
  return status;
}

int64_t GpuRegion::Unregister(const std::shared_ptr<grpc::Channel>& channel) const {
  grpc::ClientContext context;
  v1::UnregisterRegionRequest request;
  request.set_handle(handle_);
  v1::UnregisterRegionResponse response;
  const grpc::Status status =
      v1::Regions::NewStub(channel)->UnregisterRegion(&context, request, &response);
  return status.ok() ? response.use_count() : -1;
}

v1::RegionState GpuRegion::State(const std::shared_ptr<grpc::Channel>& channel) const {
  grpc::ClientContext context;
  v1::GetRegionRequest request;
  request.set_handle(handle_);
  v1::GetRegionResponse response;
  v1::Regions::NewStub(channel)->GetRegion(&context, request, &response);
  return response.state();
}

void GpuRegion::Upload(const SharedFile& file) {
  Synchronize();
  std::memcpy(pinned_, file.data(), size_);
  Check(cudaSetDevice(gpu_), "cudaSetDevice");
  Check(cudaMemcpyAsync(device_, pinned_, size_, cudaMemcpyHostToDevice, stream_),
        "cudaMemcpyAsync");
  Check(cudaEventRecord(event_, stream_), "cudaEventRecord");
}

void GpuRegion::Synchronize() const {
  Check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

void GpuRegion::Download(const SharedFile& file) const {
  Check(cudaSetDevice(gpu_), "cudaSetDevice");
  Check(cudaMemcpyAsync(pinned_, device_, size_, cudaMemcpyDeviceToHost, stream_),
        "cudaMemcpyAsync");
  Synchronize();
  std::memcpy(file.data(), pinned_, size_);
}

GpuPrompt::GpuPrompt(const PromptData& data, bool results, int gpu)
    : data_(data),
      results_(results),
      file_(SharedFile::Sealed(RangedPrompt::BytesFor(data))),
      region_(file_->size(), gpu) {}

std::vector<v1::CompressRequest> GpuPrompt::Messages() {
  ranged_ = std::make_unique<RangedPrompt>(data_, file_.get(), region_.handle(), results_);
  std::vector<v1::CompressRequest> messages = AllMessages(data_);
  for (v1::CompressRequest& message : messages) {
    if (message.has_open()) {
      *message.mutable_open() = ranged_->Open(message.open());
      message.mutable_open()->set_transports(0, v1::TRANSPORT_CUDA_IPC);
    }
    if (message.has_pieces()) message = ranged_->Put(message, /*keys_and_values=*/true);
  }
  region_.Upload(*file_);
  return messages;
}

Outcome GpuPrompt::Get(Outcome outcome) const {
  region_.Download(*file_);
  return ranged_->Get(std::move(outcome));
}

}  // namespace structkv::testkit
