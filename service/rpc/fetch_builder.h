// Cuts a slice of a held cache into messages, one at a time, and sends what does not go in them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "grpcpp/support/byte_buffer.h"
#include "kernels/backend.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/prompt.h"
#include "service/rpc/write_step.h"
#include "service/session/held_slice.h"
#include "service/transport/negotiation.h"
#include "structkv/v1/held_cache.pb.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::rpc {

// `CacheInfo` of a slice, but for the transport.
v1::CacheInfo EncodeInfo(const session::HeldSlice& slice);

// Not thread-safe.
class FetchBuilder {
 public:
  struct Options {
    int64_t max_message_bytes = 0;  // kMinMessageBytes or more; no message is longer
    int64_t skip_bytes = 0;         // 0 to the slice's total_bytes()
    bool checksums = false;
    bool info_only = false;
    // Where keys and values go, and why there.
    transport::Granted granted = {transport::InlineTransport(), ""};
    // Told of the end of each transfer, on any thread, which it must not hold up; may come when the
    // builder is gone. Not null where the transport has transfers.
    std::function<void(const absl::Status&)> on_transfer;
  };

  // Tensors that are not contiguous, and travel in messages, are arranged in buffers of `buffers`;
  // what goes into memory that the host cannot reach is put there by `backend`. Both outlive this.
  // All else is sent from where it lies.
  FetchBuilder(session::HeldSlice slice, const Options& options, engine::BufferPool* buffers,
               const Backend* backend);

  // The next message: `info`, layers, `summary`, the last one. What it says lies in a region was
  // written there; a transfer that it names has begun, with the layer's last message. Waits for a
  // transfer to end where too many are under way, and before the summary.
  // FAILED_PRECONDITION, naming the region, where its memory is gone; also what Backend::Fill
  // returns.
  absl::StatusOr<WriteStep> Next();
  int64_t sent_bytes() const { return sent_bytes_; }
  const session::HeldSlice& slice() const { return slice_; }
  const transport::Transport& transport() const { return *options_.granted.transport; }

 private:
  enum class State : uint8_t { kInfo, kLayers, kSummary };

  absl::StatusOr<WriteStep> NextLayer();
  // Puts a message's worth of the layer's keys and values where a transfer takes them from.
  absl::StatusOr<WriteStep> Stage();
  // Begins the transfer of what was put there.
  void Send();
  // The room for what there is of a tensor; empty: it goes in messages.
  const engine::Buffer& RoomOf(const session::SlicedTensor& tensor) const;
  // Copies what a tensor has from `offset` on to where it belongs there.
  absl::Status Put(const session::SlicedTensor& tensor, int64_t offset, int64_t bytes) const;
  // What comes next of `tensor`, `bytes` of it: in a message, or where the transport has room for
  // it.
  absl::StatusOr<wire::OutgoingPiece> Piece(const session::SlicedTensor& tensor, int64_t bytes);
  void StartLayer();
  grpc::ByteBuffer Summary() const;
  // Passes layers and tensors that lie before `skip_bytes`.
  void Skip(int64_t bytes);

  const session::HeldSlice slice_;
  const Options options_;
  engine::BufferPool* const buffers_;
  const Backend* const backend_;
  State state_ = State::kInfo;
  // Where the next piece starts.
  int64_t layer_;
  size_t tensor_ = 0;
  int64_t offset_ = 0;
  bool layer_begun_ = false;  // a message of it was sent
  engine::LayerInput room_;   // of layer_, in the place of results
  // Of layer_, where there are transfers: how far its tensors lie in the room, and what is to be
  // sent from there.
  size_t staged_tensor_ = 0;
  int64_t staged_bytes_ = 0;
  bool staged_ = false;
  engine::LayerOutput rows_;
  const std::shared_ptr<std::atomic<int64_t>> sending_ = std::make_shared<std::atomic<int64_t>>(0);
  int64_t sent_bytes_ = 0;
};

}  // namespace structkv::rpc
