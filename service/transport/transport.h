// Where the tensors of one prompt lie. The seam between a session and the ways in which tensors
// reach it; one implementation a file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/prompt.h"

namespace structkv::transport {

enum class Kind : uint8_t { kInline, kSharedMemory, kCudaIpc, kNccl };
inline constexpr Kind kKinds[] = {Kind::kInline, Kind::kSharedMemory, Kind::kCudaIpc, Kind::kNccl};

// "inline", "shared_memory", "cuda_ipc", "nccl".
std::string_view KindName(Kind kind);

// Tensors that are read or written where they lie begin at multiples of this in their region:
// kernels need no alignment, but rows should not straddle more cache lines than they must.
inline constexpr uint64_t kRangeAlignment = 64;

// A run of bytes in one of the regions that a prompt named.
struct RegionRange {
  uint32_t region = 0;  // index
  uint64_t offset_bytes = 0;
  uint64_t size_bytes = 0;

  bool operator==(const RegionRange&) const = default;
};

// Longest key of a transfer.
inline constexpr size_t kMaxTransferKeyBytes = 128;

// A tensor that travels beside the messages, as a buffer of a transfer between the two ends.
struct PairTransfer {
  std::string key;  // the transfer's
  uint64_t size_bytes = 0;

  bool operator==(const PairTransfer&) const = default;
};

// How a tensor of an answer travels: in the message, or as the others say.
using ResultSource = std::variant<std::monostate, RegionRange, PairTransfer>;

// Where results are written. Holds nothing: the memory may be gone, which does not matter for what
// it says.
struct ResultPlace {
  RegionRange range;
  const std::byte* data = nullptr;  // null: results travel in messages
  // Not empty: they are sent from there by transfers, whose keys begin so.
  std::string transfer_prefix;

  // The key of a layer's transfer.
  std::string TransferKey(int64_t layer) const;
  // How a tensor of a layer travels that was written there, or elsewhere.
  ResultSource SourceOf(int64_t layer, absl::Span<const std::byte> tensor) const;
};

// The transfers of one prompt. Both functions begin one and return; `done` is called once, on any
// thread, which it must not hold up, without a lock, also where the transport is gone before. The
// memory of the buffers stays until the transfer has let go of it, whatever becomes of them.
// Thread-safe.
class Transfers {
 public:
  // Layers whose rows are on their way back, at most: whoever sends takes care.
  static constexpr int64_t kMostSending = 2;
  // Errors: UNAVAILABLE, and INVALID_ARGUMENT, ALREADY_EXISTS or DEADLINE_EXCEEDED where the peer's
  // end is another, its key waits already, or the peer does not begin.
  using Done = absl::AnyInvocable<void(const absl::Status&)>;

  virtual ~Transfers() = default;

  // Receives a layer's keys and values into the room that they have.
  virtual void Receive(const std::string& key, const engine::LayerInput& input,
                       Done done) const = 0;
  // Sends a layer's rows from the room in which they were written.
  virtual void Send(const engine::LayerOutput& output, Done done) const = 0;
};

// Thread-safe. Holds what the prompt uses of its peer's memory until it is
// destroyed; buffers that it gives out hold their own share of that for as long as they live, so
// their memory stays mapped whatever the peer does.
//
// A dead peer: its memory stays, as above, and the prompt ends when its stream breaks. A peer that
// changes memory which is being read gets wrong results. One that takes it away is found by
// Check().
class Transport {
 public:
  virtual ~Transport() = default;

  virtual Kind kind() const = 0;
  // Whether keys and values come as ranges or transfers, each as a whole, and are read where they
  // lie. What comes of other tensors is copied, from messages or ranges.
  virtual bool in_place() const = 0;
  // Not null where what is in place comes by transfers, into room that GiveRoom() gives, and kept
  // rows go back by them.
  virtual const Transfers* transfers() const { return nullptr; }
  // Whether the host can read what is in place. It cannot where that lies in a GPU's memory, as
  // does then the room of GiveRoom(): the backend alone touches it.
  virtual bool host_readable() const { return true; }

  // The bytes of a range that the peer named. They belong to the peer: who checks values before
  // using them must copy them first. INVALID_ARGUMENT, with the numbers, where the range does not
  // lie in its region, or the transport has none.
  virtual absl::StatusOr<engine::Buffer> Resolve(const RegionRange& range) const = 0;
  // Likewise of a tensor that is read in place. INVALID_ARGUMENT also where it begins at no
  // multiple of kRangeAlignment, or where results are written.
  virtual absl::StatusOr<engine::Buffer> ResolveInPlace(const RegionRange& range) const = 0;

  // Takes memory of the transport's own, once, before any of what follows; again it does nothing.
  // RESOURCE_EXHAUSTED, with the numbers, where it is not free.
  virtual absl::Status Reserve() { return absl::OkStatus(); }
  // Whether kept rows are written into room that GiveRoom() gives.
  virtual bool gives_room() const = 0;
  // Gives `input` the room that there is for the kept rows of its layer, where there is any, and
  // with transfers() that for a full layer's keys and values.
  virtual void GiveRoom(engine::LayerInput* input) const = 0;
  virtual ResultPlace result_place() const = 0;

  // Waits until what the peer has named can be read; to be called before a layer is computed, on
  // the thread that computes. DEADLINE_EXCEEDED, after a few seconds, where the peer has not
  // written it.
  virtual absl::Status Await() const { return absl::OkStatus(); }
  // Whether all memory is still there; FAILED_PRECONDITION names the region. UNAVAILABLE, with the
  // reason, where the way to the peer is gone. To be asked after each use: what was read before is
  // not to be trusted otherwise.
  virtual absl::Status Check() const = 0;
};

// Everything travels in messages.
const std::shared_ptr<Transport>& InlineTransport();

}  // namespace structkv::transport
