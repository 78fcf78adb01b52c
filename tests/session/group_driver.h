// Does random things to the ranks of one shard group and to its model, and holds the one to the
// other.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "service/session/session.h"
#include "tests/session/group_model.h"
#include "tests/session/session_probe.h"
#include "tests/testing/numbers.h"
#include "tests/testing/prompt_data.h"

namespace structkv::session {

// A random prompt, divided, and what it must give.
struct GroupScenario {
  GroupScenario(std::string name, uint32_t tokens, testkit::Random* random, const Backend& backend);

  int64_t ranks() const { return static_cast<int64_t>(parts.size()); }
  int64_t layers() const { return spec.geometry.layers; }
  // `key` names the rank for retries.
  SessionRequest Request(int64_t rank, bool key = false) const;
  const std::string& Name(int64_t rank) const { return names[static_cast<size_t>(rank)]; }

  std::string id;
  std::vector<testkit::PromptData> parts;  // of each rank; one has a NaN where a layer is bad
  std::vector<std::string> names;          // of each rank, for retries
  engine::PromptSpec spec;
  std::vector<engine::PromptSpec> own;    // with each rank's heads
  std::vector<testkit::Answer> expected;  // of each rank
  std::optional<GroupModel::Bad> bad;
  bool calm = false;  // nothing goes wrong: it must end well
};

// Expectations are GoogleTest's. Not thread-safe.
class GroupDriver {
 public:
  // `scenario` outlives the driver.
  GroupDriver(const GroupScenario& scenario, SessionManager* manager, testkit::Random* random);

  // One event; then waits for what the model says, and checks that it is all.
  void Step();
  // The group, if it waits, was ended by others.
  void ExpectWaitEnded(absl::StatusCode code);

  // What its ranks hold.
  int64_t reserved_bytes() const;
  int64_t active_sessions() const;
  bool over() const { return over_; }
  // Ranks are missing.
  bool waits() const { return model_.waiting() && active_sessions() > 0; }
  bool finished() const { return model_.finished(); }
  // What was done, for a failure's report.
  const std::string& log() const { return log_; }

 private:
  struct Rank {
    std::shared_ptr<Session> session;
    std::shared_ptr<Probe> probe;
  };
  Rank& At(int64_t rank) { return ranks_[static_cast<size_t>(rank)]; }
  void Log(int64_t rank, const char* what);
  void Open(int64_t rank);
  void OpenBadly(int64_t rank);
  void OpenAgain(int64_t rank);
  void SendNext(int64_t rank);
  void DoWrong(int64_t rank);
  void Check();
  bool Matches(int64_t rank, const Seen& seen) const;
  void CheckEnd(int64_t rank, const Seen& seen);

  const GroupScenario& scenario_;
  SessionManager& manager_;
  testkit::Random& random_;
  const bool keys_;
  GroupModel model_;
  std::vector<Rank> ranks_;
  bool over_ = false;
  std::string log_;
};

}  // namespace structkv::session
