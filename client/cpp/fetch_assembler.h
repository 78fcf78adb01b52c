// Puts a fetched cache together, over several streams where one breaks, and holds the server to the
// protocol.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/cpp/bytes_pool.h"
#include "structkv/bytes.h"
#include "structkv/held_cache.h"
#include "structkv/result.h"
#include "structkv/v1/held_cache.pb.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::client::internal {

// Not thread-safe. Every error but the allocator's, and that of FetchOptions.max_bytes, is
// DATA_LOSS and says what the server did wrong.
class FetchAssembler {
 public:
  // Tensors that have no room are allocated as `options` say, which outlive this, or from `pool`.
  // `options.on_info` and `on_layer` are called from within Add().
  // `on_layer` also gets the key of the transfer that brings the layer's keys and values to where
  // they are said to lie, empty where they are there.
  FetchAssembler(const FetchOptions& options, BytesPool* pool,
                 std::function<void(LayerResult, const std::string& key)> on_layer);

  // Keys and values are to lie in `room` from now on, however they travel; it is `range` to the
  // server. Before the first message.
  void UseRoom(Bytes room, const wire::Range& range);
  // The next messages come from another stream, whose `request` skips received_bytes() and names
  // the room or not.
  void StartStream(const v1::FetchCacheRequest& request);
  absl::Status Add(const wire::FetchResponse& response);
  // The stream ended with OK.
  absl::Status Finish() const;
  // Forgets what came behind the first `layers` of those that were asked for.
  absl::Status GoBackTo(uint32_t layers);

  uint64_t received_bytes() const { return received_bytes_; }
  // Once a first message came.
  const std::optional<v1::CacheInfo>& info() const { return info_; }

 private:
  // A tensor of the layer that comes.
  struct Due {
    v1::Tensor tensor = v1::TENSOR_UNSPECIFIED;
    uint64_t size = 0;
    Bytes LayerResult::*place = nullptr;
  };

  absl::Status AddInfo(v1::CacheInfo info);
  absl::Status AddLayer(const v1::LayerResult& message, const wire::Pieces& pieces);
  absl::Status AddPiece(const wire::Piece& piece);
  // That the tensor that is due comes by a transfer.
  absl::Status AddTransfer(const wire::Piece& piece);
  // Lays out layer number `index` of those that were asked for.
  absl::Status StartLayer(uint32_t index);
  absl::Status CompleteLayer();
  // Where it belongs in the room; empty: elsewhere.
  Bytes RoomOf(const Due& due) const;

  const FetchOptions& options_;
  BytesPool* const pool_;
  const std::function<void(LayerResult, const std::string&)> on_layer_;

  Bytes room_;
  wire::Range room_range_;
  std::vector<int> transports_;  // that this stream's request names
  std::optional<v1::CacheInfo> info_;
  v1::Open open_;
  v1::Opened opened_;
  bool stream_has_info_ = false;
  bool has_summary_ = false;
  uint64_t skipped_ = 0;         // of this stream
  uint64_t received_bytes_ = 0;  // of all streams
  uint32_t index_ = 0;           // the layer that comes
  LayerResult layer_;
  std::string transfer_key_;  // of its keys and values; empty: they come otherwise
  std::vector<Due> due_;      // tensors of it
  size_t tensor_ = 0;         // of due_, that comes
  uint64_t offset_ = 0;
};

}  // namespace structkv::client::internal
