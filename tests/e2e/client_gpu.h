// Prompts of the client library whose tensors lie in memory of a GPU, of the fake CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "gtest/gtest.h"
#include "structkv/arena.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/e2e/client_prompt.h"
#include "tests/kernels/cuda/fake_runtime.h"

namespace structkv::testkit {

inline client::RegionOptions GpuOptions(int gpu = 0, size_t bytes = size_t{2} << 20) {
  client::RegionOptions options;
  options.kind = client::RegionKind::kGpu;
  options.size_bytes = bytes;
  options.gpu = gpu;
  options.cuda_library = "";  // the fake one, in the program itself
  return options;
}

// Null where there is no such region.
inline std::shared_ptr<client::Arena> GpuArena(const client::RegionOptions& options) {
  const auto region = client::Region::Create(options);
  return region.ok() ? std::make_shared<client::Arena>(*region) : nullptr;
}

// A layer whose keys and values lie in the arena, and with `all` its other tensors too.
inline absl::StatusOr<client::LayerTensors> GpuLayer(client::Arena* arena, const PromptData& data,
                                                     uint32_t layer, bool all = false) {
  client::LayerTensors tensors = TensorsOf(data, layer);
  auto blocks = std::make_shared<std::vector<client::Bytes>>();
  std::vector<absl::Span<const std::byte>*> placed = {&tensors.keys, &tensors.values};
  if (all) {
    placed.insert(placed.end(), {&tensors.window_queries, &tensors.saliency, &tensors.key_scales});
  }
  for (absl::Span<const std::byte>* span : placed) {
    if (span->empty()) continue;
    absl::StatusOr<client::Bytes> block = arena->Allocate(span->size());
    if (!block.ok()) return block.status();
    const uint64_t at = *arena->region()->OffsetOf(block->span());
    if (absl::Status status = arena->region()->Write(at, *span); !status.ok()) return status;
    *span = block->span();
    blocks->push_back(*std::move(block));
  }
  tensors.owner = blocks;
  return tensors;
}

// A stream of the fake runtime's GPU 0, whose work runs when it is waited for. It becomes the
// thread's GPU.
class FakeStream {
 public:
  FakeStream() {
    EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, 0), cudaSuccess);
  }
  ~FakeStream() { EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess); }
  FakeStream(const FakeStream&) = delete;
  FakeStream& operator=(const FakeStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Has what lies in a GPU's memory there only once the work of `stream` has run; zeros until then.
inline void WriteLate(absl::Span<const std::byte> data, cudaStream_t stream) {
  auto* const to = const_cast<std::byte*>(data.data());
  structkv::testing::FakeCuda::BeginAccess();
  const std::string bytes(reinterpret_cast<const char*>(to), data.size());
  std::memset(to, 0, data.size());
  structkv::testing::FakeCuda::EndAccess();
  const auto write = [to, bytes] { std::memcpy(to, bytes.data(), bytes.size()); };
  EXPECT_EQ(structkv::testing::FakeCuda::Launch(stream, write), cudaSuccess);
}

// What a session is to use, all of one region.
inline client::SessionOptions InArena(const std::shared_ptr<client::Arena>& arena,
                                      bool results = true) {
  client::SessionOptions options;
  options.regions = {arena->region()};
  if (results) options.results = arena;
  return options;
}

inline absl::StatusOr<client::Compressed> CompressFromGpu(
    client::Client& client, const PromptData& data, const std::shared_ptr<client::Arena>& arena,
    const client::SessionOptions& options, bool all = false) {
  return client::CompressPrompt(
      client, data.open(), [&](uint32_t layer) { return GpuLayer(arena.get(), data, layer, all); },
      options);
}

inline absl::StatusOr<client::Compressed> CompressInline(client::Client& client,
                                                         const PromptData& data) {
  return client::CompressPrompt(client, data.open(),
                                [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
                                  return TensorsOf(data, layer);
                                });
}

// The same with the rows that lie in the region copied to the host.
inline client::LayerResult ToHost(client::LayerResult layer, const client::Region& region) {
  for (client::Bytes* bytes : {&layer.keys, &layer.values}) {
    const auto at = region.OffsetOf(bytes->span());
    if (!at.has_value()) continue;
    auto copy = std::make_shared<std::vector<std::byte>>(bytes->size());
    if (!region.Read(*at, absl::MakeSpan(*copy)).ok()) copy->clear();
    *bytes = client::Bytes(copy->data(), copy->size(), copy);
  }
  return layer;
}
inline std::string TextOf(client::Compressed compressed, const client::Region& region) {
  for (client::LayerResult& layer : compressed.layers) layer = ToHost(std::move(layer), region);
  return Text(compressed);
}

}  // namespace structkv::testkit
