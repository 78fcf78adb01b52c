#include "tests/testing/nccl_prompt.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "tests/testing/fake_nccl/fake_nccl.h"

namespace structkv::testkit {
namespace {

constexpr v1::Tensor kRows[] = {v1::TENSOR_KEYS, v1::TENSOR_VALUES};

bool IsRows(const v1::TensorPiece& piece) {
  return piece.tensor() == v1::TENSOR_KEYS || piece.tensor() == v1::TENSOR_VALUES;
}

// Not to be parsed as text anywhere.
std::string NewKey() {
  static std::atomic<int> last = 0;
  return "\xff\x01'" + std::to_string(++last) + "-";
}

}  // namespace

struct NcclMoves::Move {
  std::vector<std::string> buffers;
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  absl::Status status;
};

NcclMoves::~NcclMoves() {
  // Without a lock: it may be now that transfers are told their end.
  for (const auto& [key, move] : moves_) client_.Withdraw(key);
}

void NcclMoves::Offer(const std::string& key, nccl::Direction direction,
                      std::vector<std::string> buffers) {
  auto move = std::make_shared<Move>();
  move->buffers = std::move(buffers);
  nccl::Transfer transfer;
  transfer.direction = direction;
  for (std::string& buffer : move->buffers) {
    transfer.buffers.push_back(
        {reinterpret_cast<std::byte*>(buffer.data()), static_cast<int64_t>(buffer.size())});
  }
  transfer.hold = move;
  transfer.done = [move](const absl::Status& status) {
    const std::lock_guard lock(move->mutex);
    move->done = true;
    move->status = status;
    move->changed.notify_all();
  };
  moves_[key] = move;
  client_.Offer(key, std::move(transfer));
}

const std::vector<std::string>* NcclMoves::Moved(const std::string& key, bool wait) const {
  const auto found = moves_.find(key);
  if (found == moves_.end()) return nullptr;
  Move& move = *found->second;
  std::unique_lock lock(move.mutex);
  if (wait) move.changed.wait_for(lock, std::chrono::seconds(10), [&] { return move.done; });
  return move.done && move.status.ok() ? &move.buffers : nullptr;
}

nccl::WorkerOptions NcclWorkerOptions(bool impatient) {
  nccl::WorkerOptions options;
  options.group_bytes = 100'000;  // so that layers take several
  options.tick_interval = absl::Milliseconds(100);
  if (!impatient) {
    options.silence_limit = options.group_limit = absl::Minutes(1);
    return options;
  }
  options.connect_limit = absl::Seconds(2);
  options.group_limit = absl::Seconds(2);
  options.abort_limit = absl::Seconds(5);
  return options;
}

NcclClient::NcclClient(const std::shared_ptr<grpc::Channel>& channel, const std::string& name,
                       const std::string& tenant, const nccl::WorkerOptions& options) {
  using nccl::testing::FakeApi;
  worker_ = *nccl::Worker::Start(FakeApi(), nccl::testing::FakeDeviceApi(), options);
  const nccl::Identity identity = {nccl::kProtocolVersion, FakeApi()->version(), name,
                                   "0000:01:00.0", options.group_bytes};
  auto stream = client::internal::NcclStream::Attach(channel, worker_.get(), identity,
                                                     absl::Seconds(10), tenant);
  if (!stream.ok()) {
    std::fprintf(stderr, "%s\n", stream.status().ToString().c_str());
    std::abort();
  }
  stream_ = *std::move(stream);
}

NcclPrompt::NcclPrompt(const PromptData& data, NcclClient* client)
    : data_(data), client_(*client), key_(NewKey()), moves_(client) {}

std::vector<v1::CompressRequest> NcclPrompt::Messages() const {
  std::vector<v1::CompressRequest> messages = AllMessages(data_);
  for (v1::CompressRequest& message : messages) {
    if (message.has_open()) {
      message.mutable_open()->add_transports(v1::TRANSPORT_NCCL);
      message.mutable_open()->set_nccl_pair(client_.pair());
    }
    if (!message.has_pieces()) continue;
    for (v1::TensorPiece& piece : *message.mutable_pieces()->mutable_pieces()) {
      if (!IsRows(piece)) continue;
      const uint64_t bytes = piece.data().size();
      piece.mutable_transfer()->set_key(Key(piece.layer()));
      piece.mutable_transfer()->set_size_bytes(bytes);
    }
  }
  return messages;
}

void NcclPrompt::Offer(uint32_t layer, int64_t extra_bytes) {
  std::vector<std::string> buffers;
  for (const v1::Tensor tensor : kRows) {
    const auto& tensors = data_.effective().tensors;
    if (std::find(tensors.begin(), tensors.end(), tensor) == tensors.end()) continue;
    buffers.push_back(data_.tensor(layer, tensor));
  }
  if (buffers.empty()) return;
  buffers.back().resize(buffers.back().size() + static_cast<size_t>(extra_bytes));
  moves_.Offer(Key(layer), nccl::Direction::kSend, std::move(buffers));
}

void NcclPrompt::Take(const v1::CompressResponse& response) {
  if (!response.has_layer()) return;
  std::vector<v1::TensorPiece>& pieces = announced_[response.layer().layer()];
  for (const v1::TensorPiece& piece : response.layer().pieces()) {
    if (piece.has_transfer()) pieces.push_back(piece);
  }
  if (!response.layer().complete() || pieces.empty()) return;
  std::vector<std::string> buffers;
  for (const v1::TensorPiece& piece : pieces) {
    buffers.emplace_back(piece.transfer().size_bytes(), '\0');
  }
  moves_.Offer(pieces.front().transfer().key(), nccl::Direction::kReceive, std::move(buffers));
}

Outcome NcclPrompt::Run(const std::shared_ptr<grpc::Channel>& channel) {
  Call call(channel);
  for (uint32_t layer = 0; layer < data_.layers(); ++layer) Offer(layer);
  for (const v1::CompressRequest& message : Messages()) call.Send(message);
  call.HalfClose();
  return Finish(&call);
}

void NcclPrompt::TakeAll(Call* call) {
  for (const v1::CompressResponse& response : call->ResponsesFrom(taken_)) {
    Take(response);
    ++taken_;
  }
}

Outcome NcclPrompt::Finish(Call* call) {
  while (call->WaitForResponses(taken_ + 1)) TakeAll(call);
  return Get(call->Finish());
}

Outcome NcclPrompt::Get(Outcome outcome) {
  std::map<std::string, size_t> next;  // buffer of a transfer
  for (v1::CompressResponse& response : outcome.responses) {
    if (!response.has_layer()) continue;
    for (v1::TensorPiece& piece : *response.mutable_layer()->mutable_pieces()) {
      if (!piece.has_transfer()) continue;
      const std::string key = piece.transfer().key();
      const std::vector<std::string>* buffers = moves_.Moved(key, outcome.status.ok());
      if (buffers != nullptr) piece.set_data((*buffers)[next[key]++]);
    }
  }
  return outcome;
}

}  // namespace structkv::testkit
