// CUDA IPC between two processes on a real GPU: opened once, waited for, computed on in place, and
// freed by the exporter once it is closed.
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device_memory.h"
#include "tests/kernels/cuda/ipc_exporter.h"

namespace structkv::testing {
namespace {

constexpr int64_t kTokens = 1000;
constexpr int64_t kDim = 128;
constexpr int64_t kBytes = int64_t{4} << 20;
static_assert(kTokens * kDim * 2 <= kBytes);

// The memory's first byte, as the backend gathers it in a row of float16 elements.
int FirstByte(const Backend& backend, const ImportedMemory& memory) {
  const TensorView source =
      TensorView::Dense(memory.data(), DType::kF16, Layout::kHeadTokenDim, 1, kTokens, kDim);
  std::vector<std::byte> row(kDim * sizeof(uint16_t));
  const int32_t first = 0;
  const absl::Status status = backend.Gather(
      source, &first, /*per_head=*/false,
      MutableTensorView::Dense(row.data(), DType::kF16, Layout::kHeadTokenDim, 1, 1, kDim),
      SerialFor);
  EXPECT_TRUE(status.ok()) << status;
  return std::to_integer<int>(row[0]);
}

TEST(DeviceIpcTest, AnotherProcessExports) {
  // Before this process uses CUDA.
  IpcExporter exporter(0, kBytes, [] { return 0; });
  auto backend = cuda::CreateCudaBackend({.device_memory_bytes = int64_t{256} << 20});
  if (!backend.ok()) GTEST_SKIP() << "no GPU: " << backend.status();
  auto one = (*backend)->Import(exporter.memory());
  auto two = (*backend)->Import(exporter.memory());
  ASSERT_TRUE(one.ok() && two.ok()) << one.status() << two.status();
  EXPECT_EQ((*one)->data(), (*two)->data());
  exporter.RunStream();
  ASSERT_TRUE((*one)->Await(std::chrono::steady_clock::now() + std::chrono::seconds(5)).ok());
  EXPECT_EQ(FirstByte(**backend, **one), 7);

  ExportedMemory more = exporter.memory();
  more.bytes = int64_t{1} << 40;
  EXPECT_TRUE(absl::IsInvalidArgument((*backend)->Import(more).status()));
  ExportedMemory garbage = exporter.memory();
  garbage.memory_handle = std::string(kIpcHandleBytes, 'x');
  garbage.base_address = 1;
  EXPECT_FALSE((*backend)->Import(garbage).ok());
  EXPECT_TRUE((*backend)->Health().ok());

  one->reset();
  EXPECT_EQ(FirstByte(**backend, **two), 7) << "the other one holds it";
  two->reset();
  exporter.Free();
  EXPECT_FALSE((*backend)->Import(exporter.memory()).ok()) << "it was freed";
}

TEST(DeviceIpcTest, OfThisProcess) {
  auto backend = cuda::CreateCudaBackend({.device_memory_bytes = int64_t{256} << 20});
  if (!backend.ok()) GTEST_SKIP() << "no GPU: " << backend.status();
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  cudaDeviceProp properties;
  ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
  const cuda::DeviceBytes bytes = *cuda::MakeDeviceBytes(kBytes);
  const cuda::Stream stream = *cuda::MakeStream();
  const cuda::Event event = *cuda::MakeEvent();
  ASSERT_EQ(cudaMemsetAsync(bytes.get(), 7, 2, stream.get()), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(event.get(), stream.get()), cudaSuccess);
  ExportedMemory own = {
      .memory_handle = std::string(kIpcHandleBytes, 'x'),
      .bytes = kBytes,
      .device_uuid = std::string(properties.uuid.bytes, sizeof(properties.uuid.bytes)),
      .exporter = ProcessId(),
      .base_address = reinterpret_cast<uint64_t>(bytes.get()),
      .event_address = reinterpret_cast<uint64_t>(event.get())};
  const auto memory = (*backend)->Import(own);
  ASSERT_TRUE(memory.ok()) << memory.status();
  ASSERT_TRUE((*memory)->Await(std::chrono::steady_clock::now() + std::chrono::seconds(5)).ok());
  EXPECT_EQ(FirstByte(**backend, **memory), 7);
}

}  // namespace
}  // namespace structkv::testing
