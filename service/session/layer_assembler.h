// Puts the pieces of a prompt together to layers.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/prompt.h"
#include "service/engine/prompt_spec.h"
#include "service/session/piece_map.h"
#include "service/session/session.h"
#include "service/transport/transport.h"

namespace structkv::session {

// Holds the buffers of at most `layers_in_flight` layers, each from its first piece until
// LayerDone(). A layer whose first pieces are positions holds skeleton rows, and is smaller. With
// PromptSpec::pull a layer comes in two parts: once what decides is complete it is popped and
// computed, then its rows are expected; until these came it is unfinished. What
// came is remembered for all layers until the end, so that a piece that is sent again is known
// whenever it comes; its bytes are compared with those that came first while the layer is
// incomplete, and afterwards with their digest. Not thread-safe.
class LayerAssembler {
 public:
  // `spec`, `pool` and `transport` outlive the object. 1 <= layers_in_flight <= layers. Where the
  // transport is in place, keys and values are not copied: a layer holds what they lie in, and the
  // same piece again is the same range.
  LayerAssembler(const engine::PromptSpec* spec, engine::BufferPool* pool, int64_t layers_in_flight,
                 const transport::Transport* transport = transport::InlineTransport().get());

  enum class Taken : uint8_t {
    kYes,       // copied, or known already
    kNoBuffer,  // nothing was done: come again after a LayerDone()
    kStopped,   // `stop` was set in the middle; the layer is of no further use
  };

  // The pivot is known: layers from skeleton->from_layer on may come as skeleton rows. Null: none.
  void SetSkeleton(std::shared_ptr<const engine::Skeleton> skeleton) {
    skeleton_ = std::move(skeleton);
  }

  // Copies one piece to its place, or takes note of its range. The errors are those of
  // Session::Append; after one the object is of no further use.
  absl::StatusOr<Taken> Take(const InputPiece& piece, const std::atomic<bool>& stop);

  // A layer whose keys and values are to come by a transfer, and of which all else came.
  struct Incoming {
    std::string key;
    const engine::LayerInput* input = nullptr;  // until Arrived()
  };
  // Each is told once.
  std::optional<Incoming> PopIncoming();
  // They came.
  void Arrived(int64_t layer);

  // The next layer that is complete, in order of completion.
  std::optional<engine::LayerInput> PopComplete();
  bool has_complete() const { return !complete_.empty(); }
  // The one that PopComplete gives next; null where there is none.
  engine::LayerInput* NextComplete() { return complete_.empty() ? nullptr : &complete_.front(); }

  // With PromptSpec::pull: that many rows of each KV head of a layer that was popped may come from
  // now on.
  void ExpectRows(int64_t layer, int64_t kept);
  // The next layer whose rows are complete, in order of completion: they are its keys and values.
  std::optional<engine::LayerInput> PopRows();
  bool has_rows() const { return !complete_rows_.empty(); }

  // The buffers of a layer that was popped, or its rows, are free.
  void LayerDone() { --buffers_used_; }

  Turn turn() const {
    if (!partial_.empty()) return Turn::kCallers;
    return buffers_used_ > 0 ? Turn::kServers : Turn::kNobodys;
  }

  // INVALID_ARGUMENT, naming what is missing, where the client's commit is not what came.
  absl::Status CheckCommit(int64_t layers, int64_t input_bytes);

  // Bytes that came or were named, each counted once.
  int64_t received_bytes() const { return received_bytes_; }
  // Layers of which all tensors, and the rows that are pulled, came or were named.
  int64_t received_layers() const { return received_layers_; }

  // Memory that the records may take.
  static int64_t RecordBytes(const engine::PromptSpec& spec);

 private:
  struct Layer {
    std::array<PieceMap, engine::kInputTensors> tensors;
    int missing = 0;              // tensors that are not complete
    bool skeleton = false;        // holds skeleton rows: positions came
    bool finished = false;        // all came, pulled rows included
    std::optional<int64_t> rows;  // that are pulled of each KV head; none: not expected yet
  };

  // Whether the tensor is read where it lies.
  bool InPlace(engine::InputTensor tensor) const {
    return transport_.in_place() &&
           (tensor == engine::InputTensor::kKeys || tensor == engine::InputTensor::kValues);
  }
  // Take(), of a piece whose place was checked: its data are where its bytes lie, and are `lent`
  // where they lie in a range.
  absl::StatusOr<Taken> Place(const InputPiece& piece, int64_t tensor_bytes, engine::Buffer lent,
                              const std::atomic<bool>& stop);
  // The bytes of a piece's range, of a tensor of so many bytes; none of a transfer.
  absl::StatusOr<engine::Buffer> ResolveSource(const InputPiece& piece, int64_t tensor_bytes) const;
  // Notes the transfer that the piece's tensor comes by. INVALID_ARGUMENT where the layer's others
  // come by another one.
  absl::Status JoinTransfer(const InputPiece& piece, engine::LayerInput& input);
  std::string Name(const InputPiece& piece) const;
  absl::Status CheckWindow(const InputPiece& piece) const;
  absl::Status CheckSkeletonOrder(const InputPiece& piece, const Layer& layer) const;
  absl::Status CheckPositionValues(const InputPiece& piece) const;
  // Whether a piece whose place is known holds what came there, as far as can be told. `known` and
  // `digest` are those of then and now. nullopt: stopped.
  std::optional<bool> IsKnownAgain(const InputPiece& piece, const PieceDigest& known,
                                   PieceDigest digest, const std::atomic<bool>& stop);
  int64_t TensorBytes(const Layer& layer, size_t tensor) const {
    if (layer.rows.has_value() && spec_.pulls(static_cast<engine::InputTensor>(tensor))) {
      return spec_.PulledBytes(static_cast<engine::InputTensor>(tensor), *layer.rows);
    }
    return (layer.skeleton ? skeleton_bytes_ : tensor_bytes_)[tensor];
  }
  // The layer's buffers, or null where none is free.
  engine::LayerInput* Buffers(int64_t layer, bool skeleton_rows);
  engine::Buffer& BufferOf(engine::LayerInput& input, engine::InputTensor tensor) const;
  void Complete(int64_t layer);
  // Moves lowest_unfinished_ past layers that are complete.
  void SkipFinished();

  const engine::PromptSpec& spec_;
  engine::BufferPool* pool_;
  const transport::Transport& transport_;
  const int64_t layers_in_flight_;
  std::array<int64_t, engine::kInputTensors> tensor_bytes_{};    // of a full layer
  std::array<int64_t, engine::kInputTensors> skeleton_bytes_{};  // of one of skeleton rows
  std::shared_ptr<const engine::Skeleton> skeleton_;
  std::vector<Layer> layers_;
  int64_t lowest_unfinished_ = 0;  // layer; all below it were fully received
  int64_t buffers_used_ = 0;       // layers that hold buffers
  std::map<int64_t, engine::LayerInput> partial_;
  std::map<int64_t, std::string> transfer_keys_;    // of layers in partial_
  std::map<int64_t, engine::LayerInput> incoming_;  // by transfers
  std::deque<Incoming> told_;                       // of these, to be told
  std::deque<engine::LayerInput> complete_;
  std::deque<engine::LayerInput> complete_rows_;
  int64_t received_bytes_ = 0;
  int64_t received_layers_ = 0;
};

}  // namespace structkv::session
