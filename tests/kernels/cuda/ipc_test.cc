// Memory of other processes: opened once, waited for, closed with its last user. The exporters are
// children of the test, on the fake runtime like itself.
#include <chrono>
#include <memory>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/ipc_memory.h"
#include "tests/kernels/cuda/fake_runtime.h"
#include "tests/kernels/cuda/ipc_exporter.h"

namespace structkv::cuda {
namespace {

using testing::FakeCuda;
using testing::FakeHeld;
using ::testing::HasSubstr;

constexpr int64_t kBytes = 10'000;

// Its answers are FakeCuda::freed_while_open().
class Exporter : public testing::IpcExporter {
 public:
  explicit Exporter(int gpu = 0) : IpcExporter(gpu, kBytes, &FakeCuda::freed_while_open) {}
};

std::chrono::steady_clock::time_point Soon() {
  return std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
}

class IpcTest : public ::testing::Test {
 protected:
  void SetUp() override {
    FakeCuda::Reset({.count = 2});
    devices_ = *Devices::Open({.memory_bytes = int64_t{64} << 20, .lanes = 1});
    imports_ = std::make_shared<IpcImports>(*devices_);
    held_ = FakeCuda::held();
  }
  void TearDown() override {
    EXPECT_EQ(imports_->open(), 0);
    EXPECT_EQ(FakeCuda::held(), held_);
    imports_.reset();
    devices_.reset();
    EXPECT_EQ(FakeCuda::held(), FakeHeld());
  }

  void ExpectRefused(const ExportedMemory& exported, absl::StatusCode code,
                     const std::string& text) {
    const absl::Status status = imports_->Import(exported).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }
  // The first byte of memory of the GPU.
  static std::byte FirstByte(const ImportedMemory& memory) {
    EXPECT_EQ(cudaSetDevice(memory.gpu()), cudaSuccess);
    const PinnedBytes pinned = *MakePinnedBytes(1);
    const Stream stream = *MakeStream();
    EXPECT_EQ(cudaMemcpyAsync(pinned.get(), memory.data(), 1, cudaMemcpyDeviceToHost, stream.get()),
              cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
    return *pinned;
  }

  std::unique_ptr<Devices> devices_;
  std::shared_ptr<IpcImports> imports_;
  FakeHeld held_;
};

TEST_F(IpcTest, IsOpenedOnceAndClosedWithTheLast) {
  Exporter exporter(1);
  auto one = imports_->Import(exporter.memory());
  auto two = imports_->Import(exporter.memory());
  ASSERT_TRUE(one.ok() && two.ok()) << one.status() << two.status();
  EXPECT_EQ((*one)->data(), (*two)->data());
  EXPECT_EQ((*one)->gpu(), 1);
  EXPECT_EQ(imports_->open(), 1);
  EXPECT_EQ(FakeCuda::held().imports, 1);
  one->reset();
  EXPECT_EQ(FakeCuda::held().imports, 1);
  two->reset();
  EXPECT_EQ(FakeCuda::held().imports, 0);
  EXPECT_EQ(exporter.Free(), 0) << "it is closed";
}

TEST_F(IpcTest, TheFakeNoticesMemoryThatIsFreedTooEarly) {
  Exporter exporter;
  const auto memory = imports_->Import(exporter.memory());
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(exporter.Free(), 1);
}

TEST_F(IpcTest, IsReadOnceItsEventWasReached) {
  Exporter exporter;
  const auto memory = imports_->Import(exporter.memory());
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(FirstByte(**memory), std::byte{0});
  exporter.RunStream();
  ASSERT_TRUE((*memory)->Await(Soon()).ok());
  EXPECT_EQ(FirstByte(**memory), std::byte{7});
}

// It is dead, or never ran what it recorded its event behind: nobody waits for ever.
TEST_F(IpcTest, AnEventThatIsNotReachedIsAnError) {
  Exporter exporter;
  const auto memory = imports_->Import(exporter.memory());
  ASSERT_TRUE(memory.ok()) << memory.status();
  exporter.Kill();
  const absl::Status status = (*memory)->Await(Soon());
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("not reached in time"));
  EXPECT_EQ(FirstByte(**memory), std::byte{0}) << "what is open stays";
}

TEST_F(IpcTest, OfThisProcessItsOwnAddressesAreUsed) {
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const DeviceBytes bytes = *MakeDeviceBytes(kBytes);
  const Stream stream = *MakeStream();
  const Event event = *MakeEvent();
  ASSERT_EQ(cudaMemsetAsync(bytes.get(), 7, 1, stream.get()), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(event.get(), stream.get()), cudaSuccess);
  ExportedMemory own = {.memory_handle = std::string(kIpcHandleBytes, 'x'),
                        .bytes = kBytes,
                        .device_uuid = devices_->all()[1]->uuid(),
                        .exporter = ProcessId(),
                        .base_address = reinterpret_cast<uint64_t>(bytes.get()),
                        .event_address = reinterpret_cast<uint64_t>(event.get())};
  {
    const auto memory = imports_->Import(own);
    ASSERT_TRUE(memory.ok()) << memory.status();
    EXPECT_EQ((*memory)->data(), bytes.get());
    EXPECT_EQ(imports_->open(), 0);
    EXPECT_TRUE((*memory)->Await(Soon()).ok());
    EXPECT_EQ(FirstByte(**memory), std::byte{7});
  }
  own.device_uuid = devices_->all()[0]->uuid();
  ExpectRefused(own, absl::StatusCode::kFailedPrecondition, "is not in the memory of GPU 0");
}

TEST_F(IpcTest, WhatCannotBeOpenedIsRefused) {
  Exporter exporter;
  ExportedMemory bad = exporter.memory();
  bad.device_uuid = std::string(kDeviceUuidBytes, '\x01');
  ExpectRefused(bad, absl::StatusCode::kInvalidArgument, "(GPU 0), ");
  for (const int64_t bytes : {int64_t{0}, int64_t{-1}, kBytes + 1}) {
    bad = exporter.memory();
    bad.bytes = bytes;
    ExpectRefused(bad, absl::StatusCode::kInvalidArgument, "1 to 10000, what the allocation has");
  }
  bad = exporter.memory();
  bad.event_handle = std::string(kIpcHandleBytes, 'x');
  ExpectRefused(bad, absl::StatusCode::kFailedPrecondition, "cudaIpcOpenEventHandle");
  FakeCuda::FailCall(1, cudaErrorIllegalAddress);  // behind cudaSetDevice
  ExpectRefused(exporter.memory(), absl::StatusCode::kUnavailable, "cudaIpcOpenMemHandle");
}

TEST_F(IpcTest, MemoryThatWasFreedOrWhoseProcessIsGoneIsRefused) {
  Exporter exporter;
  EXPECT_EQ(exporter.Free(), 0);
  ExpectRefused(exporter.memory(), absl::StatusCode::kFailedPrecondition,
                "the exporter must live and still have it");
  Exporter dead;
  dead.Kill();
  ExpectRefused(dead.memory(), absl::StatusCode::kFailedPrecondition, "cudaIpcOpenMemHandle");
}

TEST_F(IpcTest, AnOlderAllocationAtTheAddressIsStillOpen) {
  Exporter exporter;
  const auto memory = imports_->Import(exporter.memory());
  ASSERT_TRUE(memory.ok()) << memory.status();
  ExportedMemory newer = exporter.memory();
  newer.memory_handle[40] ^= 1;
  ExpectRefused(newer, absl::StatusCode::kFailedPrecondition, "an older allocation");
}

TEST(ImportTest, ABackendOfTheHostHasNone) {
  const absl::Status status = (*cpu::CreateCpuBackend())->Import({}).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_EQ(status.message(), "the backend cpu computes in the host's memory");
}

}  // namespace
}  // namespace structkv::cuda
