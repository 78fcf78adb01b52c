// What is known of several replicas, and which of them a prompt goes to.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "structkv/replica.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::client::internal {

// What is to be placed.
struct PlacementRequest {
  // Of a shard group of several ranks, which must meet; empty: a prompt by itself.
  std::string group;
  bool holds = false;           // whether it takes memory for held caches
  std::set<std::string> tried;  // addresses that are left out
};

// Not thread-safe. Moments (`now`, `asked`) are times of one monotonic clock since any moment.
//
// A prompt by itself goes to the replica with the least share of its memory reserved: as the
// replica last said, with what this client has opened and ended there since. Those within
// kSameShare of the least are taken in turn by chance, so that clients that know the same do not
// all take the same one.
//
// A shard group goes to the first usable replica in the order of a hash of its name with each
// address: ranks that know the same replicas take the same one.
class ReplicaTable {
 public:
  static constexpr double kSameShare = 0.05;

  ReplicaTable(const ReplicaOptions& options, uint64_t seed) : options_(options), random_(seed) {}

  // Forgets those that are not among them.
  void SetAddresses(const std::vector<std::string>& addresses);
  bool empty() const { return replicas_.empty(); }

  // Replicas that are to be asked for their load; each is waited for until one of the next two.
  std::vector<std::string> TakeDue(absl::Duration now);
  // It was asked at `asked`, and has answered.
  void OnLoad(const std::string& address, const v1::GetLoadResponse& load, absl::Duration asked);
  // It was asked in vain.
  void OnFailure(const std::string& address, const absl::Status& status, absl::Duration asked,
                 absl::Duration now);
  // A stream to it broke: it is not used until it was asked.
  void Suspect(const std::string& address, const absl::Status& status, absl::Duration now);
  // It has no room until then.
  void SetFull(const std::string& address, absl::Duration until);

  // Where a prompt goes; nullopt: answers are due that may change that. With `impatient` those of
  // replicas that were well a moment ago are not waited for. UNAVAILABLE, or what all have failed
  // with, where no replica can take it; the text says why of each.
  absl::StatusOr<std::optional<std::string>> Choose(const PlacementRequest& request,
                                                    absl::Duration now, bool impatient);

  // A prompt of about `bytes` of memory is on its way to the replica; its number.
  uint64_t Begin(const std::string& address, uint64_t bytes);
  // It was admitted, with that memory.
  void Open(uint64_t prompt, uint64_t bytes, absl::Duration now);
  void End(uint64_t prompt, absl::Duration now);

  // In the order of addresses.
  std::vector<ReplicaState> Report() const;

 private:
  struct Replica {
    std::optional<v1::GetLoadResponse> load;
    absl::Duration asked;  // when `load` was asked for
    bool asking = false;
    int failures = 0;           // since it last answered
    absl::Status failure;       // the last
    absl::Duration failed;      // when
    absl::Duration ask_again;   // after a failure
    absl::Duration full_until;  // 0: it has room
  };
  struct Prompt {
    std::string address;
    uint64_t bytes = 0;
    std::optional<absl::Duration> opened;
    std::optional<absl::Duration> ended;
  };
  using Entry = std::pair<const std::string, Replica>;

  bool IsFresh(const Replica& replica, absl::Duration now) const;
  static bool IsUsable(const Replica& replica);
  // Whether its answer is waited for before another one is taken.
  bool IsAwaited(const Replica& replica, absl::Duration now, bool impatient) const;
  static bool HasRoom(const Replica& replica, absl::Duration now);
  double Share(const Entry& entry, bool holds) const;
  std::string LeastLoaded(const std::vector<const Entry*>& candidates, bool holds,
                          absl::Duration now);
  absl::StatusOr<std::optional<std::string>> ChooseForGroup(const PlacementRequest& request,
                                                            absl::Duration now, bool impatient);
  // Why none can be taken, or nullopt while one that has failed is being asked again.
  absl::StatusOr<std::optional<std::string>> None(const PlacementRequest& request) const;

  const ReplicaOptions options_;
  std::mt19937_64 random_;
  std::map<std::string, Replica> replicas_;  // by address
  std::map<uint64_t, Prompt> prompts_;
  uint64_t next_prompt_ = 1;
};

}  // namespace structkv::client::internal
