// Collects pieces into messages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "client/cpp/session_core.h"
#include "structkv/bytes.h"
#include "structkv/v1/compression.pb.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::client::internal {

// Messages of at most `StreamOptions.chunk_bytes` of tensor data, and of what the server accepts.
// Not thread-safe. What was not flushed is not sent.
class Packer {
 public:
  // kNever: for the library's own threads, which read the stream and so must not wait for it.
  enum class Wait : uint8_t { kForRoom, kNever };

  explicit Packer(SessionCore* core, Wait wait = Wait::kForRoom);

  // Without an `owner` the data are copied. Where tensors lie in regions, what does is named
  // instead, of a GPU keys and values alone, and `owner` is held until the layer was answered; keys
  // and values that do not are copied to the staging arena, or INVALID_ARGUMENT.
  absl::Status Add(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> data,
                   uint64_t offset, const std::shared_ptr<const void>& owner);
  absl::Status Flush();

 private:
  // Names keys or values that go by the NCCL pair.
  absl::Status AddTransfer(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> data,
                           uint64_t offset, const std::shared_ptr<const void>& owner);
  // Adds a piece whose data go another way.
  void AddName(uint32_t layer, v1::Tensor tensor, uint64_t offset, wire::OutgoingPiece piece);
  // Of data that may lie in a GPU's memory, from where they are copied.
  absl::Status AddFromHost(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> data,
                           uint64_t offset, const std::shared_ptr<const void>& owner);
  absl::Status AddData(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> data,
                       uint64_t offset, const std::shared_ptr<const void>& owner);
  // Copies `data` to the staging arena.
  absl::StatusOr<Bytes> Stage(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> data,
                              absl::string_view why);
  absl::Status MakeRoom();
  void AddPiece(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> part,
                uint64_t offset, const std::shared_ptr<const void>& owner);

  SessionCore* const core_;
  const Wait wait_;
  const size_t chunk_;
  std::vector<wire::OutgoingPiece> pieces_;
  size_t filled_ = 0;  // with overheads
  size_t bytes_ = 0;   // tensor bytes alone
};

}  // namespace structkv::client::internal
