// Keys and values that go, and rows that come, by an NCCL pair.
#include <algorithm>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "client/cpp/session_core.h"

namespace structkv::client::internal {
namespace {

// NCCL's own; it does not write to what it sends.
nccl::Buffer BufferOf(absl::Span<const std::byte> data) {
  return {const_cast<std::byte*>(data.data()), static_cast<int64_t>(data.size())};
}

bool Requires(const v1::Opened& opened, v1::Tensor tensor) {
  const auto& required = opened.required_tensors();
  return std::find(required.begin(), required.end(), tensor) != required.end();
}

}  // namespace

absl::StatusOr<std::string> SessionCore::Transfer(uint32_t layer, v1::Tensor tensor,
                                                  absl::Span<const std::byte> data,
                                                  const std::shared_ptr<const void>& owner) {
  std::string key = transfers_->KeyOf(layer);
  Leaving rows;
  {
    absl::MutexLock lock(&mutex_);
    if (status_.has_value()) return key;
    Leaving& leaving = leaving_[layer];
    (tensor == v1::TENSOR_KEYS ? leaving.keys : leaving.values) = data;
    leaving.owners.push_back(owner);
    const bool values = !leaving.values.empty() || !Requires(opened_, v1::TENSOR_VALUES);
    if (leaving.keys.empty() || !values) return key;
    rows = std::move(leaving);
    leaving_.erase(layer);
  }
  std::vector<nccl::Buffer> buffers = {BufferOf(rows.keys)};
  const std::shared_ptr<const GpuMemory> memory = GpuOf(rows.keys);
  if (!rows.values.empty()) {
    buffers.push_back(BufferOf(rows.values));
    const std::shared_ptr<const GpuMemory> other = GpuOf(rows.values);
    if (other != memory) {
      if (absl::Status status = memory->RecordAlso(*other); !status.ok()) return status;
    }
  }
  rows.owners.push_back(memory);  // NCCL waits for its event
  transfers_->Offer(
      key, nccl::Direction::kSend, std::move(buffers), memory->event(),
      std::make_shared<std::vector<std::shared_ptr<const void>>>(std::move(rows.owners)),
      [this](const absl::Status& status) {
        if (!status.ok()) Fail(status);
      });
  return key;
}

void SessionCore::DeliverInTurn(Event event) {
  auto arriving = std::make_shared<Arriving>();
  const std::string key = assembler_.TakeTransferKey();
  arriving->arrived = key.empty();
  arriving->event = std::move(event);
  {
    absl::MutexLock lock(&mutex_);
    if (status_.has_value()) return;
    arriving_.push_back(arriving);
  }
  if (key.empty()) return transfers_->Post([this] { DeliverArrived(); });
  std::vector<nccl::Buffer> buffers;
  const auto& layer = std::get<LayerResult>(arriving->event);
  for (const Bytes* rows : {&layer.keys, &layer.values}) {
    if (!rows->empty()) buffers.push_back(BufferOf(rows->span()));
  }
  transfers_->Offer(key, nccl::Direction::kReceive, std::move(buffers), nullptr,
                    std::const_pointer_cast<void>(place_.results.owner()),
                    [this, arriving](const absl::Status& status) {
                      if (!status.ok()) return Fail(status);
                      {
                        absl::MutexLock lock(&mutex_);
                        arriving->arrived = true;
                      }
                      DeliverArrived();
                    });
}

void SessionCore::DeliverArrived() {
  while (true) {
    std::shared_ptr<Arriving> next;
    {
      absl::MutexLock lock(&mutex_);
      if (status_.has_value()) return;
      if (arriving_.empty() && ends_well_) break;
      if (arriving_.empty() || !arriving_.front()->arrived) return;
      next = std::move(arriving_.front());
      arriving_.pop_front();
    }
    if (const auto* layer = std::get_if<LayerResult>(&next->event)) ReleaseHeld(layer->layer);
    Deliver(std::move(next->event));
  }
  End(absl::OkStatus());
}

}  // namespace structkv::client::internal
