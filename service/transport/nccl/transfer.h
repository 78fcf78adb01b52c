// One transfer of a pair: contiguous device buffers that go one way, in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/types/span.h"

namespace structkv::nccl {

enum class Direction : uint8_t { kSend, kReceive };

struct Buffer {
  std::byte* data = nullptr;  // [bytes], device, contiguous, not null where bytes > 0
  int64_t bytes = 0;
};

struct Transfer {
  Direction direction = Direction::kSend;
  // As many, and as long, as the other end's.
  std::vector<Buffer> buffers;
  // A recorded cudaEvent_t after which the buffers may be read or written; may be null.
  void* after = nullptr;
  // Whose it is, for Hub::Cancel; may be null.
  const void* owner = nullptr;
  // Whatever keeps buffers and event. Let go of once NCCL touches them no more: with `done`, or,
  // where that is an error, when the abort is through, which may be later.
  std::shared_ptr<void> hold;
  // Called once, without a lock, on the GPU's thread, which must not be held up. After an error
  // (UNAVAILABLE) what was received is undefined.
  absl::AnyInvocable<void(const absl::Status&)> done;
};

// A part of a buffer.
struct Piece {
  std::byte* data = nullptr;
  int64_t bytes = 0;
};

// Parts the buffers, in order, into groups of at most `group_bytes` (at least 1) and of at most
// kMaxGroupPieces pieces; a buffer that does not fit is cut. Depends on the lengths alone, so that
// both ends do the same. Empty buffers are left out.
inline constexpr size_t kMaxGroupPieces = 1024;
std::vector<std::vector<Piece>> PlanGroups(absl::Span<const Buffer> buffers, int64_t group_bytes);

}  // namespace structkv::nccl
