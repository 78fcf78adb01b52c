// Compresses a prompt of random tensors: structkv_example [ADDRESS]
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "structkv/client.h"

using structkv::client::Client;
using structkv::client::LayerTensors;
namespace v1 = structkv::v1;

namespace {

constexpr uint32_t kLayers = 4;
constexpr uint32_t kQueryHeads = 8;
constexpr uint32_t kKvHeads = 2;
constexpr uint32_t kDim = 64;
constexpr uint32_t kTokens = 2000;

std::vector<float> RandomTensor(size_t size) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> tensor(size);
  for (float& value : tensor) value = normal(random);
  return tensor;
}

absl::Span<const std::byte> Bytes(const std::vector<float>& tensor) {
  return {reinterpret_cast<const std::byte*>(tensor.data()), tensor.size() * sizeof(float)};
}

int Fail(const char* what, const absl::Status& status) {
  std::fprintf(stderr, "%s: %s\n", what, status.ToString().c_str());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  auto client = Client::Connect(argc > 1 ? argv[1] : "127.0.0.1:7411");
  if (!client.ok()) return Fail("connect", client.status());

  v1::Open open;
  open.mutable_geometry()->set_layer_count(kLayers);
  open.mutable_geometry()->set_query_head_count(kQueryHeads);
  open.mutable_geometry()->set_kv_head_count(kKvHeads);
  open.mutable_geometry()->set_key_dim(kDim);
  open.set_prompt_tokens(kTokens);
  open.set_dtype(v1::DTYPE_F32);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.mutable_method()->mutable_structkv()->mutable_kv_budget()->set_ratio(0.1);

  auto session = (*client)->OpenPrompt(open);
  if (!session.ok()) return Fail("open", session.status());
  const uint32_t window = (*session)->opened().window_tokens();
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const auto keys = RandomTensor(size_t{kKvHeads} * kTokens * kDim);
    const auto values = RandomTensor(size_t{kKvHeads} * kTokens * kDim);
    const auto queries = RandomTensor(size_t{kQueryHeads} * window * kDim);
    LayerTensors tensors;
    tensors.keys = Bytes(keys);
    tensors.values = Bytes(values);
    tensors.window_queries = Bytes(queries);
    const absl::Status sent = (*session)->SendLayer(layer, tensors);
    if (!sent.ok()) return Fail("send", sent);
  }
  const absl::Status committed = (*session)->Commit();
  if (!committed.ok()) return Fail("commit", committed);

  const auto compressed = (*session)->Collect();
  if (!compressed.ok()) return Fail("collect", compressed.status());
  for (const auto& layer : compressed->layers) {
    std::printf("layer %u: %u of %u tokens, %zu bytes of keys\n", layer.layer, layer.kept_tokens,
                kTokens, layer.keys.size());
  }
  std::printf("pivot: layer %u, skeleton of %zu tokens\n", compressed->pivot->pivot_layer,
              compressed->pivot->skeleton.size());
  return 0;
}
