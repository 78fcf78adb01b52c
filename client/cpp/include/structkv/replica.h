// Several servers behind one client (docs/protocol.md, "Several replicas").
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace structkv::client {

// Of a client whose target stands for several servers. Nothing is asked for while no prompt is
// opened.
struct ReplicaOptions {
  // Gives the addresses, "host:port" or "unix:/path" each, in place of what the target names. It is
  // called by threads that open prompts, one at a time, and should return at once. Null: the target
  // is looked up.
  std::function<absl::StatusOr<std::vector<std::string>>()> resolve;
  // How old the addresses may be. After a failure they are looked up anew, at most once a second.
  // An error, or no address, leaves those that are known.
  absl::Duration resolve_interval = absl::Seconds(5);
  // How old what a replica said of its load may be when a prompt is opened; then it is asked first.
  absl::Duration load_interval = absl::Milliseconds(500);
  // A replica that has not said it by then has failed.
  absl::Duration load_timeout = absl::Seconds(1);
  // How long a failed replica is left alone before it is asked again: at first, and, doubled each
  // time, at most.
  absl::Duration initial_backoff = absl::Milliseconds(250);
  absl::Duration max_backoff = absl::Seconds(2);
};

// What a client knows of a replica.
struct ReplicaState {
  enum class Health : uint8_t {
    kUnknown,   // not asked yet
    kReady,     // takes prompts
    kDraining,  // takes none any more
    kFailed,    // could not be reached, or did not answer
  };

  std::string address;
  Health health = Health::kUnknown;
  absl::Status failure;  // of one that has failed
  // What it said last: memory that sessions have reserved, and all that there is. 0, all of them,
  // of one that does not say it to this client.
  uint64_t reserved_bytes = 0;
  uint64_t limit_bytes = 0;
  uint32_t active_sessions = 0;
};

}  // namespace structkv::client
