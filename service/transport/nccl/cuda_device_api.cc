#include "service/transport/nccl/cuda_device_api.h"

#include <cuda_runtime_api.h>

#include "kernels/cuda/cuda_error.h"

namespace structkv::nccl {
namespace {

using cuda::CudaStatus;

cudaStream_t Cuda(Stream* stream) { return reinterpret_cast<cudaStream_t>(stream); }

}  // namespace

DeviceApi CudaDeviceApi() {
  DeviceApi api;
  api.set_device = [](int device) { return CudaStatus(cudaSetDevice(device), "cudaSetDevice"); };
  api.create_stream = []() -> absl::StatusOr<Stream*> {
    cudaStream_t stream = nullptr;
    const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error != cudaSuccess) return CudaStatus(error, "cudaStreamCreateWithFlags");
    return reinterpret_cast<Stream*>(stream);
  };
  api.destroy_stream = [](Stream* stream) { (void)cudaStreamDestroy(Cuda(stream)); };
  api.wait_event = [](Stream* stream, void* event) {
    return CudaStatus(cudaStreamWaitEvent(Cuda(stream), static_cast<cudaEvent_t>(event), 0),
                      "cudaStreamWaitEvent");
  };
  api.stream_done = [](Stream* stream) -> absl::StatusOr<bool> {
    const cudaError_t error = cudaStreamQuery(Cuda(stream));
    if (error == cudaErrorNotReady) return false;
    if (error != cudaSuccess) return CudaStatus(error, "cudaStreamQuery");
    return true;
  };
  api.bus_id = [](int device) -> absl::StatusOr<std::string> {
    char id[32] = {};
    const cudaError_t error = cudaDeviceGetPCIBusId(id, sizeof(id), device);
    if (error != cudaSuccess) return CudaStatus(error, "cudaDeviceGetPCIBusId");
    return std::string(id);
  };
  return api;
}

}  // namespace structkv::nccl
