#include "tests/bench/memory_stream.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <random>
#include <utility>
#include <variant>

#include "structkv/client.h"
#include "structkv/sizes.h"

namespace structkv::bench {
namespace {

constexpr uint64_t kTableBytes = 4 * TensorSource::kPieceBytes;
constexpr v1::Tensor kOutputs[] = {v1::TENSOR_POSITIONS, v1::TENSOR_KEYS, v1::TENSOR_VALUES};

std::vector<std::byte> NormalBf16(std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<std::byte> table(kTableBytes);
  for (uint64_t at = 0; at < kTableBytes; at += sizeof(uint16_t)) {
    const auto half = static_cast<uint16_t>(std::bit_cast<uint32_t>(normal(*random)) >> 16);
    std::memcpy(table.data() + at, &half, sizeof(half));
  }
  return table;
}

std::vector<std::byte> ExponentialF32(std::mt19937* random) {
  std::exponential_distribution<float> exponential;
  std::vector<std::byte> table(kTableBytes);
  for (uint64_t at = 0; at < kTableBytes; at += sizeof(float)) {
    const float value = exponential(*random);
    std::memcpy(table.data() + at, &value, sizeof(value));
  }
  return table;
}

// splitmix64's finish: neighbours in, strangers out.
uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15U;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9U;
  x = (x ^ x >> 27) * 0x94D049BB133111EBU;
  return x ^ x >> 31;
}

absl::Status SendLayer(client::CompressSession& session, const TensorSource& source,
                       uint32_t layer) {
  for (const int number : session.opened().required_tensors()) {
    const auto tensor = static_cast<v1::Tensor>(number);
    const uint64_t size = client::InputTensorBytes(session.open(), session.opened(), tensor);
    for (uint64_t at = 0; at < size; at += TensorSource::kPieceBytes) {
      const absl::Span<const std::byte> piece =
          source.Piece(layer, tensor, at / TensorSource::kPieceBytes,
                       std::min(TensorSource::kPieceBytes, size - at));
      absl::Status status = session.Send(layer, tensor, piece, at, source.owner());
      if (!status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

// Rows of `got`, [kv_head, kept, dim], that are not the rows at `positions` of what was sent.
uint64_t WrongRows(const v1::Open& open, const TensorSource& source, uint32_t layer,
                   v1::Tensor tensor, absl::Span<const int32_t> positions,
                   absl::Span<const std::byte> got) {
  const uint64_t row = uint64_t{open.geometry().key_dim()} * sizeof(uint16_t);
  uint64_t wrong = 0;
  for (uint64_t at = 0; at < got.size(); at += row) {
    const uint64_t head = at / row / positions.size();
    const auto token = static_cast<uint64_t>(positions[at / row % positions.size()]);
    const uint64_t from = (head * open.prompt_tokens() + token) * row;
    const absl::Span<const std::byte> piece =
        source.Piece(layer, tensor, from / TensorSource::kPieceBytes, TensorSource::kPieceBytes);
    const std::byte* sent = piece.data() + from % TensorSource::kPieceBytes;
    if (std::memcmp(sent, got.data() + at, row) != 0) ++wrong;
  }
  return wrong;
}

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

TensorSource::TensorSource() {
  std::mt19937 random(1);
  auto tables = std::make_shared<Tables>();
  tables->elements = NormalBf16(&random);
  tables->saliency = ExponentialF32(&random);
  tables_ = std::move(tables);
}

absl::Span<const std::byte> TensorSource::Piece(uint32_t layer, v1::Tensor tensor, uint64_t index,
                                                uint64_t size) const {
  const bool saliency = tensor == v1::TENSOR_SALIENCY;
  const std::vector<std::byte>& table = saliency ? tables_->saliency : tables_->elements;
  const uint64_t element = saliency ? sizeof(float) : sizeof(uint16_t);
  const uint64_t place = Mix(Mix(Mix(layer) + static_cast<uint64_t>(tensor)) + index);
  const uint64_t from = place % (kTableBytes - kPieceBytes) / element * element;
  return absl::MakeConstSpan(table).subspan(from, size);
}

std::vector<std::byte> TensorSource::Make(uint32_t layer, v1::Tensor tensor, uint64_t begin,
                                          uint64_t size) const {
  std::vector<std::byte> bytes(size);
  for (uint64_t at = 0; at < size; at += kPieceBytes) {
    const absl::Span<const std::byte> piece =
        Piece(layer, tensor, (begin + at) / kPieceBytes, std::min(kPieceBytes, size - at));
    std::memcpy(bytes.data() + at, piece.data(), piece.size());
  }
  return bytes;
}

absl::StatusOr<StreamedPrompt> StreamPrompt(const std::string& address, const v1::Open& open,
                                            const TensorSource& source,
                                            const std::set<uint32_t>& sampled) {
  auto client = client::Client::Connect(address);
  if (!client.ok()) return client.status();
  // One result's memory, used over and over: a result is dropped before the next one is assembled.
  std::map<int, std::vector<std::byte>> memory;
  StreamedPrompt result;
  client::SessionOptions options;
  options.allocate = [&memory](uint32_t, v1::Tensor tensor, size_t size) {
    std::vector<std::byte>& own = memory[tensor];
    if (own.size() < size) own.resize(size);
    return client::Bytes(own.data(), size, nullptr);
  };
  options.on_event = [&](const client::Event& event) {
    const auto* layer = std::get_if<client::LayerResult>(&event);
    if (layer == nullptr || !sampled.contains(layer->layer)) return;
    const absl::Span<const int32_t> positions = layer->position_values();
    result.positions[layer->layer].assign(positions.begin(), positions.end());
    for (const auto& [tensor, bytes] :
         {std::pair(v1::TENSOR_KEYS, &layer->keys), std::pair(v1::TENSOR_VALUES, &layer->values)}) {
      result.wrong_rows += WrongRows(open, source, layer->layer, tensor, positions, bytes->span());
    }
  };
  const auto start = std::chrono::steady_clock::now();
  auto session = (*client)->OpenPrompt(open, options);
  if (!session.ok()) return session.status();
  result.opened = (*session)->opened();
  for (uint32_t layer = 0; layer < open.geometry().layer_count(); ++layer) {
    absl::Status status = SendLayer(**session, source, layer);
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
  for (const int tensor : result.opened.required_tensors()) {
    result.layer_bytes +=
        client::InputTensorBytes(open, result.opened, static_cast<v1::Tensor>(tensor));
  }
  return result;
}

}  // namespace structkv::bench
