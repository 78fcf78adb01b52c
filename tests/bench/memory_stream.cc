#include "tests/bench/memory_stream.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "structkv/client.h"
#include "structkv/sizes.h"

namespace structkv::bench {
namespace {

constexpr uint64_t kPieceBytes = uint64_t{2} << 20;
constexpr uint64_t kTableBytes = 4 * kPieceBytes;
constexpr v1::Tensor kInputs[] = {v1::TENSOR_WINDOW_QUERIES, v1::TENSOR_KEYS, v1::TENSOR_VALUES};
constexpr v1::Tensor kOutputs[] = {v1::TENSOR_POSITIONS, v1::TENSOR_KEYS, v1::TENSOR_VALUES};

// Normally distributed bf16 elements.
std::shared_ptr<const std::vector<std::byte>> MakeTable(std::mt19937* random) {
  std::normal_distribution<float> normal;
  auto table = std::make_shared<std::vector<std::byte>>(kTableBytes);
  for (uint64_t at = 0; at < kTableBytes; at += sizeof(uint16_t)) {
    const auto half = static_cast<uint16_t>(std::bit_cast<uint32_t>(normal(*random)) >> 16);
    std::memcpy(table->data() + at, &half, sizeof(half));
  }
  return table;
}

class Sender {
 public:
  explicit Sender(client::CompressSession* session)
      : session_(session), random_(1), table_(MakeTable(&random_)) {}

  absl::Status SendLayer(uint32_t layer) {
    for (const v1::Tensor tensor : kInputs) {
      const uint64_t size = client::InputTensorBytes(session_->open(), session_->opened(), tensor);
      for (uint64_t at = 0; at < size; at += kPieceBytes) {
        const uint64_t piece = std::min(kPieceBytes, size - at);
        // Every piece another cut of the table, so that no layer is like another.
        const uint64_t from = random_() % (kTableBytes - piece) / 2 * 2;
        const absl::Span<const std::byte> data(table_->data() + from, piece);
        absl::Status status = session_->Send(layer, tensor, data, at, table_);
        if (!status.ok()) return status;
      }
    }
    return absl::OkStatus();
  }

 private:
  client::CompressSession* const session_;
  std::mt19937 random_;
  const std::shared_ptr<const std::vector<std::byte>> table_;
};

}  // namespace

v1::Open LlamaOpen(uint32_t layers, uint32_t tokens) {
  v1::Open open;
  open.mutable_geometry()->set_layer_count(layers);
  open.mutable_geometry()->set_query_head_count(32);
  open.mutable_geometry()->set_kv_head_count(8);
  open.mutable_geometry()->set_key_dim(128);
  open.set_prompt_tokens(tokens);
  open.set_dtype(v1::DTYPE_BF16);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.mutable_method()->mutable_structkv()->mutable_kv_budget()->set_ratio(0.1);
  return open;
}

absl::StatusOr<StreamedPrompt> StreamPrompt(const std::string& address, const v1::Open& open) {
  auto client = client::Client::Connect(address);
  if (!client.ok()) return client.status();
  // One result's memory, used over and over: a result is dropped before the next one is assembled.
  std::map<int, std::vector<std::byte>> memory;
  client::SessionOptions options;
  options.allocate = [&memory](uint32_t, v1::Tensor tensor, size_t size) {
    std::vector<std::byte>& own = memory[tensor];
    if (own.size() < size) own.resize(size);
    return client::Bytes(own.data(), size, nullptr);
  };
  options.on_event = [](const client::Event&) {};
  const auto start = std::chrono::steady_clock::now();
  auto session = (*client)->OpenPrompt(open, options);
  if (!session.ok()) return session.status();
  StreamedPrompt result;
  result.opened = (*session)->opened();
  Sender sender(session->get());
  for (uint32_t layer = 0; layer < open.geometry().layer_count(); ++layer) {
    absl::Status status = sender.SendLayer(layer);
    if (!status.ok()) return status;
    for (const v1::Tensor tensor : kOutputs) {
      result.results_bytes += client::OutputTensorBytes(open, result.opened, layer, tensor);
    }
  }
  absl::Status status = (*session)->Commit();
  if (!status.ok()) return status;
  absl::StatusOr<v1::Summary> summary = (*session)->Wait();
  if (!summary.ok()) return summary.status();
  result.summary = *std::move(summary);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (const v1::Tensor tensor : kInputs) {
    result.layer_bytes += client::InputTensorBytes(open, result.opened, tensor);
  }
  return result;
}

}  // namespace structkv::bench
