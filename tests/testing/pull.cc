#include "tests/testing/pull.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace structkv::testkit {
namespace {

uint64_t DataBytes(const v1::CompressRequest& message) {
  uint64_t bytes = 0;
  for (const v1::TensorPiece& piece : message.pieces().pieces()) bytes += piece.data().size();
  return bytes;
}

}  // namespace

std::string PulledRows(const PromptData& data, uint32_t layer, v1::Tensor tensor,
                       const std::vector<int32_t>& positions, bool per_head) {
  const std::string& all = data.tensor(layer, tensor);
  const uint64_t heads = data.open().has_shard_group()
                             ? data.open().shard_group().kv_heads().count()
                             : data.open().geometry().kv_head_count();
  const uint64_t tokens = data.tokens(layer);
  const uint64_t row = all.size() / heads / tokens;
  const uint64_t kept = positions.size() / (per_head ? heads : 1);
  const bool head_first = data.open().layout() == v1::LAYOUT_HEAD_TOKEN_DIM;
  const std::vector<int32_t>& held = data.rows(layer);
  std::string rows(heads * kept * row, '\0');
  for (uint64_t head = 0; head < heads; ++head) {
    for (uint64_t i = 0; i < kept; ++i) {
      const int32_t position = positions[per_head ? head * kept + i : i];
      const auto token = static_cast<uint64_t>(
          held.empty() ? position : std::find(held.begin(), held.end(), position) - held.begin());
      const uint64_t from = head_first ? head * tokens + token : token * heads + head;
      const uint64_t to = head_first ? head * kept + i : i * heads + head;
      rows.replace(to * row, row, all, from * row, row);
    }
  }
  return rows;
}

PullWorker::PullWorker(Call* call, const PromptData* data, v1::Pull pull)
    : call_(*call), data_(*data), pull_(pull) {}

bool PullWorker::Pulls(v1::Tensor tensor) const {
  return tensor == v1::TENSOR_VALUES ||
         (tensor == v1::TENSOR_KEYS && pull_ == v1::PULL_KEYS_AND_VALUES);
}

v1::CompressRequest PullWorker::OpenMessage(uint32_t layers_in_flight) const {
  v1::Open open = data_.open();
  open.set_pull(pull_);
  open.set_layers_in_flight(layers_in_flight);
  return testkit::OpenMessage(open);
}

v1::CompressRequest PullWorker::LayerMessage(uint32_t layer) const {
  v1::CompressRequest message = testkit::LayerMessage(data_, layer);
  auto* pieces = message.mutable_pieces()->mutable_pieces();
  pieces->erase(std::remove_if(pieces->begin(), pieces->end(),
                               [&](const auto& piece) { return Pulls(piece.tensor()); }),
                pieces->end());
  return message;
}

v1::CompressRequest PullWorker::RowsMessage(uint32_t layer,
                                            const std::vector<int32_t>& positions) const {
  v1::CompressRequest message;
  for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
    if (!Pulls(tensor)) continue;
    const std::string rows =
        PulledRows(data_, layer, tensor, positions, data_.effective().per_head);
    const uint64_t piece_bytes = rows.size() / 7 + 1;
    for (uint64_t at = (rows.size() - 1) / piece_bytes * piece_bytes;; at -= piece_bytes) {
      v1::TensorPiece* piece = message.mutable_pieces()->add_pieces();
      piece->set_layer(layer);
      piece->set_tensor(tensor);
      piece->set_offset_bytes(at);
      piece->set_data(rows.substr(at, piece_bytes));
      if (at == 0) break;
    }
  }
  return message;
}

void PullWorker::SendLayer(uint32_t layer) {
  const v1::CompressRequest message = LayerMessage(layer);
  sent_bytes_ += DataBytes(message);
  call_.Send(message);
}

bool PullWorker::AnswerPull(uint32_t layer) {
  const std::optional<std::vector<int32_t>> positions = call_.WaitForPull(layer);
  if (!positions.has_value()) return false;
  const v1::CompressRequest message = RowsMessage(layer, *positions);
  sent_bytes_ += DataBytes(message);
  return call_.Send(message);
}

Outcome RunWithPull(const std::shared_ptr<grpc::Channel>& channel, const PromptData& data,
                    v1::Pull pull, uint32_t layers_in_flight) {
  Call call(channel);
  PullWorker worker(&call, &data, pull);
  call.Send(worker.OpenMessage(layers_in_flight));
  for (uint32_t begin = 0; begin < data.layers(); begin += layers_in_flight) {
    const uint32_t end = std::min(data.layers(), begin + layers_in_flight);
    for (uint32_t layer = begin; layer < end; ++layer) worker.SendLayer(layer);
    for (uint32_t layer = end; layer > begin; --layer) {
      if (!worker.AnswerPull(layer - 1)) return call.Finish();
    }
  }
  call.Send(CommitMessage(data.layers(), worker.sent_bytes()));
  call.HalfClose();
  return call.Finish();
}

}  // namespace structkv::testkit
