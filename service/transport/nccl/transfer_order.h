// The one place where the order of a pair's transfers is decided: the service's end.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/transport/nccl/control.h"
#include "service/transport/nccl/transfer.h"
#include "service/transport/nccl/worker_options.h"

namespace structkv::nccl {

// "transfer 'KEY'", for people: a key may be any bytes.
std::string TransferText(const std::string& key);

// INVALID_ARGUMENT for a key or lengths out of range (control.h).
absl::Status CheckOffer(const Offer& offer);

// Transfers that one end is ready for and the other is not yet, by key. A transfer that both are
// ready for gets the next number: so neither ever waits for the other's buffers with NCCL under
// way. Not thread-safe.
class TransferOrder {
 public:
  struct Numbered {
    uint64_t sequence = 0;
    std::string key;
    Transfer transfer;
  };
  // What the two ends are ready for under one key, but does not fit together.
  struct Mismatch {
    std::string key;
    Transfer transfer;
    absl::Status why;  // INVALID_ARGUMENT
  };
  // Numbers that were given out, or the reverse, since the last call.
  struct Decided {
    std::vector<Numbered> numbered;
    std::vector<Mismatch> mismatched;
  };

  // The service's own end is ready. Takes `transfer` unless it fails: ALREADY_EXISTS for a key that
  // waits, RESOURCE_EXHAUSTED where too many do.
  absl::Status Add(const std::string& key, Transfer& transfer);
  // The client's end is. Errors as of Add, and INVALID_ARGUMENT.
  absl::Status Add(Offer offer);
  Decided Take() { return std::exchange(decided_, {}); }

  // An own transfer that waits; NOT_FOUND once it has its number.
  absl::StatusOr<Transfer> Withdraw(const std::string& key);
  // All own ones that wait, by their keys: since before `limit`, where that is given.
  std::vector<std::pair<std::string, Transfer>> WithdrawAll(
      std::optional<Clock::time_point> limit = std::nullopt);
  // Drops an offer of the client's that waits. False where there is none.
  bool DropOffer(const std::string& key) { return offers_.erase(key) > 0; }

  // Numbers given out so far; the first is 1.
  uint64_t last_sequence() const { return last_sequence_; }

 private:
  absl::Status CheckRoom(const std::string& key, bool taken, size_t waiting) const;
  void Decide(std::string key, Transfer transfer, const Offer& offer);

  struct Own {
    Transfer transfer;
    Clock::time_point since;
  };

  absl::flat_hash_map<std::string, Own> own_;
  absl::flat_hash_map<std::string, Offer> offers_;
  Decided decided_;
  uint64_t last_sequence_ = 0;
};

}  // namespace structkv::nccl
