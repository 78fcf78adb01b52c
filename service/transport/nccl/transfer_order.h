// The one place where the order of a pair's transfers is decided: the service's end.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "service/transport/nccl/control.h"
#include "service/transport/nccl/transfer.h"
#include "service/transport/nccl/worker_options.h"

namespace structkv::nccl {

// "transfer 'KEY'", for people: a key may be any bytes.
std::string TransferText(const std::string& key);

// INVALID_ARGUMENT for a key or lengths out of range (control.h).
absl::Status CheckOffer(const Offer& offer);

// Transfers that wait, by key: for the other end, or, where both are ready, for their turn. One
// that both are ready for when its turn comes gets the next number: so neither ever waits for the
// other's buffers with NCCL under way. Not thread-safe.
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
  // An own transfer that waits.
  struct Waiting {
    const Transfer& transfer;
    Clock::time_point since;  // that it waits for what it waits for
    bool offered = false;     // the client is ready: it waits for its turn
  };
  // An own transfer that was taken back.
  struct Withdrawn {
    std::string key;
    Transfer transfer;
    bool offered = false;  // as of Waiting
  };

  // The service's own end is ready. Takes `transfer` unless it fails: ALREADY_EXISTS for a key that
  // waits.
  absl::Status Add(const std::string& key, Transfer& transfer);
  // The client's end is. Errors as of the other Add, RESOURCE_EXHAUSTED where too many wait, and
  // INVALID_ARGUMENT.
  absl::Status Add(Offer offer);
  std::vector<Mismatch> TakeMismatches() { return std::exchange(mismatches_, {}); }

  // Whether both ends are ready for a transfer.
  bool has_next() const { return !next_.empty(); }
  // Numbers all of these, in the order in which they became so.
  std::vector<Numbered> Take();

  // Takes own ones back that wait, and of which `which` says so.
  std::vector<Withdrawn> Withdraw(absl::FunctionRef<bool(const Waiting&)> which);
  // Drops an offer of the client's that waits. False where there is none.
  bool DropOffer(const std::string& key);

  // Own transfers that wait.
  int waiting() const { return static_cast<int>(own_.size()); }
  // Numbers given out so far; the first is 1.
  uint64_t last_sequence() const { return last_sequence_; }

 private:
  // Where both ends are ready for `key`: puts it in line, or finds that they do not fit.
  void Match(const std::string& key);
  void LeaveLine(const std::string& key);

  struct Own {
    Transfer transfer;
    Clock::time_point since;  // as of Waiting
  };

  absl::flat_hash_map<std::string, Own> own_;
  absl::flat_hash_map<std::string, Offer> offers_;
  std::deque<std::string> next_;  // keys that are in both
  std::vector<Mismatch> mismatches_;
  uint64_t last_sequence_ = 0;
};

}  // namespace structkv::nccl
