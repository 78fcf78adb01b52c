// What a session must do, as plain as can be: bytes are kept in maps, layers are computed in no
// time (or not at all while a gate is closed), and everything happens at once.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "service/engine/prompt_spec.h"
#include "tests/session/session_probe.h"

namespace structkv::session {

class SessionModel {
 public:
  struct Options {
    engine::PromptSpec spec;
    int64_t layers_in_flight = 2;
    int64_t layer_output_bytes = 0;     // of a layer, at most
    std::vector<int64_t> output_bytes;  // of each layer, of skeleton rows where it comes so
    int64_t output_limit_bytes = 0;     // of results that wait to be sent
    int64_t pivot_bytes = 0;
    // With PromptSpec::pull: of each layer, what a pull has, and the rows that it asks for.
    std::vector<int64_t> pull_bytes;
    std::vector<int64_t> kept_tokens;
    // The layer with which the pivot is decided: once it and all before it were answered, or it
    // alone was.
    int64_t decided_at = 0;
    bool decided_by_one_layer = false;
    // The layers from this one on may come as the rows of `skeleton`. None: no layer may.
    std::optional<int64_t> skeleton_from;
    std::vector<int32_t> skeleton;
    // Whether a closed gate may keep layers from being computed. Small ones are computed by whoever
    // completes them, whom a gate would hold.
    bool gate_holds = true;
    // Layers whose computation fails, and how.
    std::map<int64_t, absl::StatusCode> bad_layers;
    // The n-th layer to be computed fails as INTERNAL.
    std::optional<int64_t> failing_call;
  };
  explicit SessionModel(Options options);

  // Events.
  void Start();
  void Append(std::vector<PieceBytes> pieces);
  void Commit(int64_t layers, int64_t input_bytes);
  void EndOfInput();
  void OutputSent(int64_t bytes);
  void Cancel();
  void Fail(absl::StatusCode code);
  void CloseGate() { gate_open_ = false; }
  void OpenGate();

  // What must have been called, once everything is at rest.
  int ready() const { return ready_; }
  const std::vector<uint32_t>& layers() const { return answered_; }
  const std::vector<uint32_t>& pulls() const { return pulls_; }
  bool pivot() const { return pivot_; }
  bool finished() const { return state_ == State::kFinished; }
  std::optional<absl::StatusCode> failed() const { return failed_; }

  bool ended() const { return state_ == State::kFinished || state_ == State::kFailed; }
  bool committed() const { return state_ == State::kCommitted; }
  // `ready` was called, and no message came since.
  bool asked() const { return asked_; }
  bool parked() const { return !parked_.empty(); }
  // A layer is held at the gate.
  bool blocked() const { return running_.has_value(); }
  // The session failed in the middle of the message that had the running layer begun: it was taken
  // back if it had not reached the gate, and nobody can know. Opening the gate ends the doubt.
  bool in_doubt() const { return ended() && running_.has_value() && begun_by_last_message_; }
  bool gate_open() const { return gate_open_; }
  bool holds_memory() const { return holds_memory_; }
  int64_t unsent_bytes() const { return unsent_bytes_; }
  int64_t received_bytes() const { return received_bytes_; }
  // Every layer, and every row that is pulled.
  bool all_came() const { return LowestUnfinished() == options_.spec.geometry.layers; }
  // Layers at or above this one are refused.
  int64_t window_end() const { return LowestUnfinished() + options_.layers_in_flight; }

 private:
  enum class State : uint8_t { kIdle, kRunning, kCommitted, kFinished, kFailed };
  struct TensorBytes {
    std::string bytes;
    std::vector<char> came;  // of each byte
    int64_t missing = 0;
    std::map<std::pair<int64_t, int64_t>, bool> pieces;  // offset, size; with a checksum
  };
  enum class Verdict : uint8_t { kTaken, kNoBuffer, kRefused };

  int64_t LowestUnfinished() const;
  bool pulls_rows() const { return options_.spec.pull != engine::Pull::kNone; }
  // All came that is due: what decides, or after the layer's pull its rows.
  bool IsComplete(int64_t layer) const;
  bool IsFinished(int64_t layer) const {
    return IsComplete(layer) && (!pulls_rows() || pulled_.contains(layer));
  }
  // What the layer's tensors are where it holds skeleton rows, or all.
  std::map<engine::InputTensor, TensorBytes> TensorsOf(int64_t layer, bool skeleton_rows) const;
  bool MayBecomeSkeleton(int64_t layer) const;
  TensorBytes* Find(const PieceBytes& piece);
  bool output_full() const;
  Verdict Take(const PieceBytes& piece);
  Verdict Refuse(absl::StatusCode code);
  void TakeParked();
  void Ask();
  void StartLayer();
  void AtRest();
  // Gates and failures know a prompt by its number of tokens, and so pass over layers of fewer.
  bool IsDisturbed(int64_t layer) const;
  void Answer();
  void Pull(int64_t layer);
  void AnswerPulled();
  void GoOn();
  void End(State state);

  const Options options_;
  State state_ = State::kIdle;
  bool gate_open_ = true;
  std::vector<std::map<engine::InputTensor, TensorBytes>> layers_;
  std::set<int64_t> skeleton_layers_;  // that came as skeleton rows
  std::set<int64_t> holders_;          // layers with buffers
  std::set<int64_t> pulled_;
  std::deque<int64_t> complete_rows_;  // that wait for room
  std::vector<uint32_t> computed_;
  std::deque<int64_t> complete_;  // that wait to be computed
  std::optional<int64_t> running_;
  bool begun_by_last_message_ = false;
  int64_t calls_ = 0;
  std::deque<PieceBytes> parked_;
  bool asked_ = false;
  bool owes_ready_ = false;
  int ready_ = 0;
  std::vector<uint32_t> answered_;
  std::vector<uint32_t> pulls_;
  bool pivot_ = false;
  std::optional<absl::StatusCode> failed_;
  bool holds_memory_ = true;
  int64_t unsent_bytes_ = 0;
  int64_t received_bytes_ = 0;
};

}  // namespace structkv::session
