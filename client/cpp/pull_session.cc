// How a session answers the server's pulls.
#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/packer.h"
#include "client/cpp/row_gather.h"
#include "client/cpp/session_core.h"
#include "structkv/sizes.h"

namespace structkv::client::internal {

bool SessionCore::pulls() const {
  return open_.pull() == v1::PULL_VALUES || open_.pull() == v1::PULL_KEYS_AND_VALUES;
}

bool SessionCore::pulls(v1::Tensor tensor) const {
  if (tensor == v1::TENSOR_VALUES) return pulls();
  return tensor == v1::TENSOR_KEYS && open_.pull() == v1::PULL_KEYS_AND_VALUES;
}

absl::Status SessionCore::HoldForPull(uint32_t layer, const LayerTensors& tensors) {
  if (options_.rows) return absl::OkStatus();
  const size_t tokens =
      tensors.positions.empty() ? open_.prompt_tokens() : tensors.positions.size();
  absl::Status status = CheckPullable(open_, layer, tensors, tokens);
  if (!status.ok()) return status;
  Held held = {tensors, {tensors.positions.begin(), tensors.positions.end()}};
  held.tensors.positions = {};
  absl::MutexLock lock(&mutex_);
  if (!status_.has_value() && !rows_queued_.contains(layer))
    held_.insert_or_assign(layer, std::move(held));
  return absl::OkStatus();
}

absl::Status SessionCore::WaitForWindow(uint32_t layer) {
  const uint64_t in_flight = std::max(1U, opened_.layers_in_flight());
  absl::MutexLock lock(&mutex_);
  while (!status_.has_value() && layer >= lowest_without_rows_ + in_flight) {
    changed_.Wait(&mutex_);
  }
  return status_.has_value() ? EndedStatus() : absl::OkStatus();
}

absl::Status SessionCore::WaitForRows(uint32_t layer) {
  absl::MutexLock lock(&mutex_);
  while (!status_.has_value() && !rows_queued_.contains(layer)) changed_.Wait(&mutex_);
  return rows_queued_.contains(layer) ? absl::OkStatus() : EndedStatus();
}

bool SessionCore::RowsAreDue() const {
  if (!pulls()) return false;
  for (uint32_t layer = lowest_without_rows_; layer < open_.geometry().layer_count(); ++layer) {
    if (rows_queued_.contains(layer) || !sent_.has_layer(layer)) continue;
    if (IsSent(layer)) return true;
  }
  return false;
}

absl::StatusOr<PulledRows> SessionCore::RowsFor(const RowPull& pull) {
  if (options_.rows) return options_.rows(pull);
  std::optional<Held> held;
  {
    absl::MutexLock lock(&mutex_);
    if (const auto found = held_.find(pull.layer); found != held_.end()) {
      held = std::move(found->second);
      held_.erase(found);
    }
  }
  if (!held.has_value()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the server asks for rows of layer ", pull.layer,
                     ", which was not sent by SendLayer(); PromptOptions.rows must give them"));
  }
  const auto allocate = [this](size_t size) -> absl::StatusOr<Bytes> {
    if (shared_place() != nullptr) return AllocateStaging(size, /*wait=*/false);
    return pool_->Acquire(size);
  };
  return GatherPulledRows(open_, held->tensors, held->positions, pull, allocate);
}

// On one of gRPC's threads, which reads the stream: nothing here waits for the stream.
void SessionCore::AnswerPull(const RowPull& pull) {
  const absl::StatusOr<PulledRows> rows = RowsFor(pull);
  if (!rows.ok()) return Fail(rows.status());
  Packer packer(this, Packer::Wait::kNever);
  for (const auto& [tensor, data] :
       {std::pair(v1::TENSOR_KEYS, rows->keys), std::pair(v1::TENSOR_VALUES, rows->values)}) {
    const bool asked = tensor == v1::TENSOR_VALUES || pull.keys;
    const uint64_t needed = asked ? RowsBytes(open_, tensor, pull.kept_tokens) : 0;
    if (data.size() != needed) {
      return Fail(absl::InvalidArgumentError(absl::StrCat(
          "PromptOptions.rows gave ", data.size(), " bytes of ", v1::Tensor_Name(tensor),
          " of layer ", pull.layer, "; ", needed, " are needed")));
    }
    const absl::Status added = packer.Add(pull.layer, tensor, data, 0, rows->owner);
    // Where the session has ended, whoever waits learns why.
    if (absl::IsCancelled(added)) return;
    if (!added.ok()) return Fail(added);
  }
  if (!packer.Flush().ok()) return;
  absl::MutexLock lock(&mutex_);
  rows_queued_.insert(pull.layer);
  while (rows_queued_.contains(lowest_without_rows_)) ++lowest_without_rows_;
  changed_.SignalAll();
}

}  // namespace structkv::client::internal
