// What the thread of a GPU is told once.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>

#include "absl/time/time.h"

namespace structkv::nccl {

using Clock = std::chrono::steady_clock;

// Names a communicator among those of one worker; never used twice.
using PeerId = uint64_t;

struct WorkerOptions {
  // The CUDA device.
  int device = 0;
  // Those that live, and those that are being given back. Each takes about 50 MB of GPU memory at 8
  // channels.
  int max_communicators = 16;
  // Thread blocks, and so channels, of a communicator.
  int max_channels = 8;
  // Limits of single steps. Reaching the other end takes seconds across hosts.
  absl::Duration connect_limit = absl::Seconds(30);
  // One group of sends or receives: `group_bytes` at 25 MB/s.
  absl::Duration group_limit = absl::Seconds(10);
  absl::Duration close_limit = absl::Seconds(5);
  // How long a peer may be silent (Worker::PeerAlive).
  absl::Duration silence_limit = absl::Seconds(10);
  // How long ~Worker waits for aborts that do not return.
  absl::Duration abort_limit = absl::Seconds(10);
  // Both ends of a pair must have the same.
  int64_t group_bytes = int64_t{256} << 20;
  // How often NCCL is asked while something is under way.
  absl::Duration poll_interval = absl::Microseconds(100);
  // How often `on_tick` is called.
  absl::Duration tick_interval = absl::Seconds(1);

  // Called on the GPU's thread, without a lock; may be empty, must not block.
  std::function<void()> on_tick;
};

}  // namespace structkv::nccl
