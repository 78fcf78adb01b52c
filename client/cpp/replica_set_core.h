// What a ReplicaSet shares with its calls that are under way.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cpp/replica_set.h"
#include "client/cpp/replica_table.h"
#include "client/cpp/target.h"

namespace structkv::client::internal {

// Thread-safe. The last one to let go of it waits for calls and transports, which no thread of
// gRPC's must.
class ReplicaSetCore : public std::enable_shared_from_this<ReplicaSetCore> {
 public:
  ReplicaSetCore(std::string text, Target target, const ClientOptions& options);
  // Cancels what is being asked.
  ~ReplicaSetCore();

  // As in ReplicaSet.
  absl::StatusOr<std::shared_ptr<Replica>> Choose(const PlacementRequest& request,
                                                  absl::Time deadline);
  absl::StatusOr<std::shared_ptr<Replica>> At(const std::string& address, absl::Time deadline);
  absl::StatusOr<std::vector<std::shared_ptr<Replica>>> All(absl::Time deadline);
  std::vector<ReplicaState> Report() const;

  uint64_t Begin(const std::string& address, uint64_t bytes);
  void Open(uint64_t prompt, uint64_t bytes);
  void End(uint64_t prompt, const std::string& address, const absl::Status& status);

 private:
  // One question for a replica's load. It holds the channel, whose end waits for gRPC's threads, so
  // that none of these may be the last to have it.
  struct LoadCall;

  // Looks addresses up where that is due: at once, or on a thread of its own.
  void Resolve();
  void OnAddresses(const absl::StatusOr<std::vector<ReplicaAddress>>& found);
  // Asks those that are due.
  void Ask();
  void AskOne(const std::string& address);
  // `call`: null where there was none.
  void OnAnswer(const std::string& address, absl::Duration asked, const absl::Status& status,
                const v1::GetLoadResponse& load, LoadCall* call);
  // Waits until there are addresses.
  absl::Status WaitForAddresses(absl::Time deadline);
  absl::StatusOr<std::shared_ptr<Replica>> ReplicaAt(const std::string& address)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // That a certificate at `address` must have; nullopt: a look-up may yet say.
  std::optional<std::string> NameOf(const std::string& address) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes out those that no stream has and that are not among the addresses, all but `kept`. Their
  // end waits for transports', so it must come after that of the lock.
  std::vector<std::shared_ptr<Replica>> TakeIdle(size_t kept) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string text_;  // the target, for errors
  const Target target_;
  const ClientOptions options_;

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  ReplicaTable table_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, std::string> names_ ABSL_GUARDED_BY(mutex_);  // of the table's
  std::map<std::string, std::shared_ptr<Replica>> replicas_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<LoadCall>> calls_ ABSL_GUARDED_BY(mutex_);
  bool resolving_ ABSL_GUARDED_BY(mutex_) = false;
  bool resolve_soon_ ABSL_GUARDED_BY(mutex_) = false;  // something failed
  absl::Duration resolved_ ABSL_GUARDED_BY(mutex_) = -absl::InfiniteDuration();
  absl::Status resolve_status_ ABSL_GUARDED_BY(mutex_);  // of the last time
};

// A channel to a server; `several`: of a client that has more, and goes elsewhere soon where this
// one is silent. `name`: that its certificate must have; empty: the address's own.
absl::StatusOr<std::shared_ptr<Replica>> MakeReplica(const std::string& address,
                                                     const std::string& name, bool several,
                                                     const ClientOptions& options);

}  // namespace structkv::client::internal
