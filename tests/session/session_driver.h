// Does random things to one session and to its model, and holds the one to the other.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "service/session/session.h"
#include "tests/session/fault_backend.h"
#include "tests/session/session_model.h"
#include "tests/session/session_probe.h"
#include "tests/testing/numbers.h"
#include "tests/testing/prompt_data.h"

namespace structkv::session {

// A random prompt, what it must give, and what goes wrong with it.
struct Scenario {
  // `tokens` tells the prompt from others that run at the same time.
  Scenario(uint32_t tokens, testkit::Random* random, const Backend& backend);

  // With skeleton rows in some layers past the pivot, and a NaN where a layer is bad.
  testkit::PromptData sent;
  SessionRequest request;
  testkit::Answer expected;  // of an engine::Prompt without a session
  SessionModel::Options model;
  std::optional<int64_t> failing_call;
  bool calm = false;   // nothing goes wrong: it must end well
  int cut_layers = 0;  // that are sent as skeleton rows
  bool pulls() const { return request.spec.pull != engine::Pull::kNone; }

 private:
  void CutLayers(testkit::Random* random);
};

// Expectations are GoogleTest's. Not thread-safe.
class SessionDriver {
 public:
  // `scenario` outlives the driver.
  SessionDriver(const Scenario& scenario, std::shared_ptr<Session> session,
                std::shared_ptr<Faults> faults, testkit::Random* random);

  // One event; then waits for what the model says, and checks that it is all.
  void Step();
  // Something that others did to the session: it fails with `code`.
  void ExpectFailure(absl::StatusCode code);
  void OpenGate();

  const SessionModel& model() const { return model_; }
  int64_t reserved_bytes() const { return reserved_bytes_; }
  // Nothing is left of it.
  bool over() const { return model_.ended() && !model_.holds_memory(); }
  // What was done, for a failure's report.
  const std::string& log() const { return log_; }

 private:
  struct Cut {
    int64_t layer;
    engine::InputTensor tensor;
    int64_t offset;
    int64_t size;
  };
  void CutTensors();
  void CutTensor(int64_t layer, engine::InputTensor tensor, int64_t size);
  void CutPulled();
  void SendMessage();
  bool IsCut(int64_t layer) const;
  bool MayBeSent(const Cut& cut) const;
  PieceBytes BytesOf(const Cut& cut) const;
  PieceBytes Make(const Cut& cut);
  PieceBytes BadPiece();
  void Append(const std::vector<PieceBytes>& pieces);
  void CommitRight();
  void CommitWrong();
  void Sent();
  void DoWrong();
  void Check();
  void CheckResults(const Seen& seen);

  const Scenario& scenario_;
  std::shared_ptr<Session> session_;
  const int64_t reserved_bytes_;
  const std::shared_ptr<Faults> faults_;
  testkit::Random& random_;
  const std::shared_ptr<Probe> probe_ = std::make_shared<Probe>();
  SessionModel model_;
  std::vector<Cut> unsent_cuts_;
  std::vector<Cut> sent_cuts_;
  size_t cut_pulls_ = 0;             // of the model's
  size_t checked_layers_ = 0;        // of the answer
  std::weak_ptr<const void> owner_;  // of the last message
  std::string log_;
};

}  // namespace structkv::session
