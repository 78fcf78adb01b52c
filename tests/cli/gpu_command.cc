// What makes the `structkv` command one that has two GPUs, of the fake CUDA runtime, and with
// `--nccl-library` the fake NCCL: linked into it, before its main.
#include "tests/kernels/cuda/fake_runtime.h"
#include "tests/testing/fake_nccl/fake_nccl.h"

namespace structkv {
namespace {

using testing::FakeCuda;

const bool kReady = [] {
  FakeCuda::Reset({.count = 2});
  FakeCuda::SetBusy([](cudaStream_t stream) {
    return !nccl::testing::StreamDone(reinterpret_cast<nccl::Stream*>(stream));
  });
  nccl::testing::SetAccess(FakeCuda::BeginAccess, FakeCuda::EndAccess);
  nccl::testing::SetStreamWait(
      [](nccl::Stream* stream) { cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(stream)); });
  return true;
}();

}  // namespace
}  // namespace structkv
