// The client library in a process of its own, with memory of a GPU of the fake CUDA runtime and a
// server at the target argv[1]. argv[2]:
//   run      compresses prompts, with results in the GPU's memory and in messages, on one stream
//   that
//            runs only when the server waits for it; says "same" where they are as inline
//   adopt    the same once, in an allocation of its own, which it frees when it is told to
//   cancel   cancels prompts under way and drops their memory at once; says "freed" when all of it
//            came back, none while the server had it open
//   other    uses a GPU that the server does not have; says why not
//   hang     sends a layer and a half, says "sent", and does nothing until it is killed
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>

#include "tests/e2e/client_gpu.h"
#include "tests/kernels/cuda/fake_runtime.h"
#include "tests/testing/process.h"

namespace structkv::testkit {
namespace {

using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;

int Fail(const std::string& why) {
  std::puts(why.c_str());
  return 1;
}

int End(const char* what) {
  if (!Eventually([] { return FakeCuda::held() == FakeHeld(); }, std::chrono::seconds(20))) {
    return Fail("memory, events or streams are left");
  }
  if (FakeCuda::freed_while_open() != 0) return Fail("freed while it was open");
  std::puts(what);
  return 0;
}

class Peer {
 public:
  explicit Peer(const std::string& target) : client_(*client::Client::Connect(target)) {}

  int Run() {
    cudaStream_t stream = nullptr;
    cudaSetDevice(0);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (const bool results : {true, false}) {
      const auto arena = GpuArena(GpuOptions());
      const auto expected = CompressInline(*client_, data_);
      if (!expected.ok()) return Fail(expected.status().ToString());
      // Written by work of the stream, which nobody waits for.
      const auto source = [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
        client::LayerTensors tensors = *GpuLayer(arena.get(), data_, layer);
        const client::LayerTensors host = TensorsOf(data_, layer);
        for (const auto& [to, from] :
             {std::pair(tensors.keys, host.keys), std::pair(tensors.values, host.values)}) {
          const std::string wrong(to.size(), 'x');
          const uint64_t at = *arena->region()->OffsetOf(to);
          if (!arena->region()->Write(at, AsBytes(wrong)).ok()) return absl::UnknownError("Write");
          cudaMemcpyAsync(const_cast<std::byte*>(to.data()), from.data(), from.size(),
                          cudaMemcpyHostToDevice, stream);
        }
        tensors.cuda_stream = stream;
        return tensors;
      };
      std::thread gpu([&] { RunGpu(*arena->region()); });
      const auto got =
          client::CompressPrompt(*client_, data_.open(), source, InArena(arena, results));
      over_ = true;
      gpu.join();
      if (!got.ok()) return Fail(got.status().ToString());
      if (got->summary.transport() != "cuda_ipc") return Fail(got->summary.transport());
      if (TextOf(*got, *arena->region()) != Text(*expected)) return Fail("different");
      over_ = false;
    }
    cudaStreamDestroy(stream);
    return End("same");
  }

  int Adopt() {
    client::RegionOptions options = GpuOptions();
    void* data = nullptr;
    cudaSetDevice(0);
    cudaMalloc(&data, 1 << 20);
    client::GpuAllocation allocation = {static_cast<std::byte*>(data) + 64, nullptr};
    absl::Status refused = client::Region::Adopt(allocation, options).status();
    if (refused.message() !=
        "GpuAllocation.data lies 64 bytes behind the begin of its allocation, which is shared as a "
        "whole; give that") {
      return Fail(refused.ToString());
    }
    allocation.data = &allocation;
    refused = client::Region::Adopt(allocation, options).status();
    if (refused.message() != "GpuAllocation.data is not in a GPU's memory") {
      return Fail(refused.ToString());
    }
    allocation.data = data;
    allocation.owner = std::shared_ptr<void>(data, [](void* owned) { cudaFree(owned); });
    options.gpu = 1;
    refused = client::Region::Adopt(allocation, options).status();
    if (refused.message() !=
        "GpuAllocation.data is in the memory of GPU 0; RegionOptions.gpu is 1") {
      return Fail(refused.ToString());
    }
    options.gpu = 0;
    auto region = client::Region::Adopt(allocation, options);
    allocation.owner = nullptr;
    if (!region.ok()) return Fail(region.status().ToString());
    if ((*region)->size() != 1 << 20) return Fail("not the whole allocation");
    auto arena = std::make_shared<client::Arena>(*region);
    const auto expected = CompressInline(*client_, data_);
    absl::StatusOr<client::Compressed> got =
        CompressFromGpu(*client_, data_, arena, InArena(arena));
    if (!got.ok()) return Fail(got.status().ToString());
    if (TextOf(*got, **region) != Text(*expected)) return Fail("different");
    got = absl::UnknownError("dropped");
    arena = nullptr;
    region = absl::UnknownError("dropped");
    return End("same");
  }

  int Cancel() {
    for (int i = 0; i < 20; ++i) {
      const auto arena = GpuArena(GpuOptions());
      if (arena == nullptr) return Fail("no room");
      auto session = client_->OpenPrompt(data_.open(), InArena(arena));
      if (!session.ok()) return Fail(session.status().ToString());
      for (uint32_t layer = 0; layer < 2; ++layer) {
        (*session)->SendLayer(layer, *GpuLayer(arena.get(), data_, layer)).IgnoreError();
      }
      (*session)->Cancel();
    }
    return End("freed");
  }

  int Other() {
    const auto arena = GpuArena(GpuOptions(1));
    const auto refused = CompressFromGpu(*client_, data_, arena, InArena(arena));
    std::puts(refused.status().ToString().c_str());
    client::SessionOptions options = InArena(arena);
    options.copy_from_gpu = true;
    const auto expected = CompressInline(*client_, data_);
    const auto copied = CompressFromGpu(*client_, data_, arena, options);
    if (!copied.ok()) return Fail(copied.status().ToString());
    return TextOf(*copied, *arena->region()) == Text(*expected) ? 0 : Fail("different");
  }

  int Hang() {
    client::RegionOptions options = GpuOptions();
    options.lease = absl::Milliseconds(500);
    const auto arena = GpuArena(options);
    auto session = client_->OpenPrompt(data_.open(), InArena(arena));
    if (!session.ok()) return Fail(session.status().ToString());
    client::LayerTensors tensors = *GpuLayer(arena.get(), data_, 0);
    if (!(*session)->SendLayer(0, tensors).ok() || !(*session)->NextEvent().ok()) return 1;
    tensors = *GpuLayer(arena.get(), data_, 1);
    tensors.values = {};
    if (!(*session)->SendLayer(1, tensors).ok()) return 1;
    std::puts("sent");
    std::fflush(stdout);
    for (;;) pause();
  }

 private:
  // As a GPU does: work that was queued, and that a record of `region` lies behind, runs, a while
  // later.
  void RunGpu(const client::Region& region) {
    while (!over_) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      std::byte any{};
      region.Read(0, absl::MakeSpan(&any, 1)).IgnoreError();
    }
  }

  const std::unique_ptr<client::Client> client_;
  const PromptData data_ = PromptData(SmallOpen(200), 5);
  std::atomic<bool> over_ = false;
};

int Main(const std::string& target, const std::string& mode) {
  FakeCuda::Reset({.count = 2, .all_pinned = true});
  Peer peer(target);
  if (mode == "run") return peer.Run();
  if (mode == "adopt") return peer.Adopt();
  if (mode == "cancel") return peer.Cancel();
  if (mode == "other") return peer.Other();
  return mode == "hang" ? peer.Hang() : 2;
}

}  // namespace
}  // namespace structkv::testkit

int main(int argc, char** argv) {
  return argc == 3 ? structkv::testkit::Main(argv[1], argv[2]) : 2;
}
