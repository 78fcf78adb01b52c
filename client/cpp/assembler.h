// Turns the server's messages into events, and holds them to the protocol.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/bytes_pool.h"
#include "structkv/options.h"
#include "structkv/result.h"
#include "structkv/v1/compression.pb.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::client::internal {

// A tensor that arrives in ascending pieces or, where `range` is set, is written there as a whole,
// or where `transferred` comes as a whole by the NCCL pair.
struct Growing {
  Bytes bytes;
  uint64_t expected = 0;
  uint64_t received = 0;
  std::optional<wire::Range> range;
  bool transferred = false;
};

// The layer or pivot whose messages are arriving.
struct PendingLayer {
  LayerResult result;
  std::string transfer_key;
  Growing positions, keys, values, key_scales, value_scales, saliency;
};
struct PendingPull {
  RowPull result;
  Growing positions;
};
struct PendingPivot {
  PivotResult result;
  Growing skeleton, centrality;
};

// Not thread-safe. Every error is DATA_LOSS and says what the server did wrong, but for those of
// memory that `allocate` does not give.
class Assembler {
 public:
  // Results are allocated by `allocate`, or from `pool` where that is null. `sent_skeleton` says
  // whether a layer was sent as skeleton rows; null: none was. `results`: the memory of
  // `open.result_range`; empty where that is unset.
  Assembler(v1::Open open, ResultAllocator allocate, BytesPool* pool,
            std::function<bool(uint32_t)> sent_skeleton = nullptr, Bytes results = {});

  // Takes one message in. An event, where that message completes one; the summary is kept back for
  // Finish().
  absl::StatusOr<std::optional<Event>> Add(wire::Response response);

  // The transfer that brings the rows of the layer that the last message completed; empty: none.
  std::string TakeTransferKey() { return std::exchange(transfer_key_, ""); }

  // The pull that the last message completed.
  std::optional<RowPull> TakePull() { return std::exchange(pulled_, std::nullopt); }

  // The stream ended with OK. The summary, where everything agrees with it.
  absl::StatusOr<v1::Summary> Finish(uint64_t sent_bytes) const;

  bool has_opened() const { return opened_.has_value(); }
  const v1::Opened& opened() const { return *opened_; }

 private:
  using MaybeEvent = absl::StatusOr<std::optional<Event>>;
  absl::Status AddOpened(v1::Opened opened);
  MaybeEvent AddLayer(const v1::LayerResult& message, const wire::Pieces& pieces);
  absl::Status AddPull(const v1::RowPull& message, const wire::Pieces& pieces);
  absl::Status StartPull(const v1::RowPull& message);
  absl::Status CompletePull();
  // Tokens that a layer has, and that it keeps.
  uint32_t TokensOf(uint32_t layer) const;
  uint32_t KeptOf(uint32_t layer) const;
  absl::Status CheckPositions(absl::Span<const int32_t> positions, uint32_t layer) const;
  MaybeEvent AddPivot(const v1::PivotDecision& message, const wire::Pieces& pieces);
  // Whether rows come to `results`.
  bool PlacesResults() const;
  absl::Status Append(const wire::Piece& piece, Growing* tensor, const char* name);
  absl::Status AppendTransfer(const wire::Piece& piece, Growing* tensor, const char* name);
  absl::Status AppendRange(const wire::Piece& piece, Growing* tensor, const char* name);
  // Memory for a tensor of a layer that has `tokens` and keeps `kept`; fails as `allocate` does.
  absl::Status Expect(uint32_t layer, v1::Tensor tensor, uint32_t tokens, uint32_t kept,
                      Growing* growing);
  absl::StatusOr<LayerResult> TakeLayer();
  absl::StatusOr<PivotResult> TakePivot();

  const v1::Open open_;
  const ResultAllocator allocate_;
  BytesPool* const pool_;
  const std::function<bool(uint32_t)> sent_skeleton_;
  const Bytes results_;

  std::optional<v1::Opened> opened_;
  std::optional<v1::Summary> summary_;
  std::set<uint32_t> answered_;
  uint64_t received_bytes_ = 0;

  std::optional<PendingLayer> layer_;
  std::string transfer_key_;
  std::optional<PendingPull> pull_;
  std::optional<RowPull> pulled_;
  std::map<uint32_t, Bytes> pulled_positions_;  // of layers that wait for their answer
  std::optional<PendingPivot> pivot_;
  bool pivot_done_ = false;
};

}  // namespace structkv::client::internal
