#include "structkv/session.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cpp/packer.h"
#include "client/cpp/session_core.h"
#include "structkv/sizes.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::client {
namespace {

// Waits where rows that the server asked for must go first.
absl::Status ReadyToSend(internal::SessionCore& core, uint32_t layer) {
  absl::Status status = core.CheckSending();
  if (!status.ok() || !core.pulls()) return status;
  return core.WaitForWindow(layer);
}

}  // namespace

CompressSession::CompressSession(std::unique_ptr<internal::SessionCore> core)
    : core_(std::move(core)) {}

CompressSession::~CompressSession() = default;

const v1::Open& CompressSession::open() const { return core_->open(); }

const v1::Opened& CompressSession::opened() const { return core_->opened(); }

const std::string& CompressSession::replica() const { return core_->stream_options().replica; }

absl::Status CompressSession::Send(uint32_t layer, v1::Tensor tensor,
                                   absl::Span<const std::byte> data, uint64_t offset_bytes,
                                   const std::shared_ptr<const void>& owner) {
  absl::Status status = ReadyToSend(*core_, layer);
  if (!status.ok()) return status;
  if (data.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("Send: no data for ", v1::Tensor_Name(tensor), " of layer ", layer));
  }
  if (tensor == v1::TENSOR_POSITIONS) core_->NoteSkeletonLayer(layer);
  internal::Packer packer(core_.get());
  status = packer.Add(layer, tensor, data, offset_bytes, owner);
  if (!status.ok()) return status;
  return packer.Flush();
}

absl::Status CompressSession::SendLayer(uint32_t layer, const LayerTensors& tensors) {
  absl::Status status = ReadyToSend(*core_, layer);
  if (!status.ok()) return status;
  const std::pair<v1::Tensor, absl::Span<const std::byte>> all[] = {
      {v1::TENSOR_WINDOW_QUERIES, tensors.window_queries},
      {v1::TENSOR_WINDOW_LSE, tensors.window_lse},
      {v1::TENSOR_SALIENCY, tensors.saliency},
      {v1::TENSOR_KEY_SCALES, tensors.key_scales},
      {v1::TENSOR_VALUE_SCALES, tensors.value_scales},
      {v1::TENSOR_KEYS, tensors.keys},
      {v1::TENSOR_VALUES, tensors.values},
  };
  status = core_->Record(tensors.cuda_stream);
  if (!status.ok()) return status;
  if (core_->pulls()) {
    status = core_->HoldForPull(layer, tensors);
    if (!status.ok()) return status;
  }
  internal::Packer packer(core_.get());
  if (!tensors.positions.empty()) {
    core_->NoteSkeletonLayer(layer);
    const absl::Span<const std::byte> positions(
        reinterpret_cast<const std::byte*>(tensors.positions.data()),
        tensors.positions.size() * sizeof(int32_t));
    status = packer.Add(layer, v1::TENSOR_POSITIONS, positions, 0, nullptr);
    if (!status.ok()) return status;
  }
  for (const auto& [tensor, data] : all) {
    if (core_->pulls(tensor)) continue;
    status = packer.Add(layer, tensor, data, 0, tensors.owner);
    if (!status.ok()) return status;
  }
  status = packer.Flush();
  // The rows are still to be copied out of memory that the caller alone keeps.
  const bool borrowed = core_->pulls() && tensors.owner == nullptr && !core_->options().rows;
  if (!status.ok() || !borrowed) return status;
  return core_->WaitForRows(layer);
}

absl::Status CompressSession::SendChunk(uint32_t layer, uint32_t first_token, uint32_t tokens,
                                        const ChunkTensors& chunk) {
  absl::Status status = ReadyToSend(*core_, layer);
  if (!status.ok()) return status;
  const v1::Open& open = core_->open();
  if (open.has_paged()) {
    return absl::InvalidArgumentError(
        "SendChunk: keys and values are paged; send their blocks with Send");
  }
  if (core_->shared_place() != nullptr || core_->transfers()) {
    return absl::InvalidArgumentError(
        "SendChunk: keys and values are read where they lie; write chunks into their tensor and "
        "send that "
        "with SendLayer");
  }
  const uint64_t prompt_tokens = open.prompt_tokens();
  if (tokens == 0 || first_token >= prompt_tokens || tokens > prompt_tokens - first_token) {
    return absl::InvalidArgumentError(absl::StrCat("SendChunk: ", tokens, " tokens from ",
                                                   first_token, " on are not within the prompt's ",
                                                   prompt_tokens));
  }
  // Rows of all heads that lie together, and how often such a run comes in the tensor.
  const bool head_first = open.layout() == v1::LAYOUT_HEAD_TOKEN_DIM;
  const uint64_t runs = head_first ? KvHeads(open) : 1;
  internal::Packer packer(core_.get());
  for (const auto& [tensor, data] :
       {std::pair(v1::TENSOR_KEYS, chunk.keys), std::pair(v1::TENSOR_VALUES, chunk.values)}) {
    const uint64_t run_bytes = InputTensorBytes(open, core_->opened(), tensor) / runs;
    const uint64_t size = run_bytes / prompt_tokens * tokens;
    if (data.size() != runs * size) {
      return absl::InvalidArgumentError(absl::StrCat("SendChunk: ", v1::Tensor_Name(tensor), " of ",
                                                     tokens, " tokens has ", data.size(),
                                                     " bytes; ", runs * size, " are needed"));
    }
    for (uint64_t run = 0; run < runs && size > 0; ++run) {
      status = packer.Add(layer, tensor, data.subspan(run * size, size),
                          run * run_bytes + run_bytes / prompt_tokens * first_token, chunk.owner);
      if (!status.ok()) return status;
    }
  }
  return packer.Flush();
}

absl::Status CompressSession::Commit() { return core_->Commit(); }

absl::StatusOr<Event> CompressSession::NextEvent() { return core_->NextEvent(); }

absl::StatusOr<Compressed> CompressSession::Collect() {
  Compressed compressed;
  compressed.opened = core_->opened();
  while (true) {
    absl::StatusOr<Event> event = core_->NextEvent();
    if (!event.ok()) return event.status();
    if (auto* layer = std::get_if<LayerResult>(&*event)) {
      compressed.layers.push_back(std::move(*layer));
    } else if (auto* pivot = std::get_if<PivotResult>(&*event)) {
      compressed.pivot = std::move(*pivot);
    } else {
      compressed.summary = std::get<v1::Summary>(*std::move(event));
      break;
    }
  }
  std::sort(compressed.layers.begin(), compressed.layers.end(),
            [](const LayerResult& a, const LayerResult& b) { return a.layer < b.layer; });
  return compressed;
}

absl::StatusOr<v1::Summary> CompressSession::Wait() { return core_->Wait(); }

void CompressSession::Cancel() { core_->Cancel(); }

}  // namespace structkv::client
