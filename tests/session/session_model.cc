#include "tests/session/session_model.h"

#include <algorithm>

#include "structkv/v1/piece_codec.h"

namespace structkv::session {

SessionModel::SessionModel(Options options)
    : options_(std::move(options)), layers_(static_cast<size_t>(options_.spec.geometry.layers)) {
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    layers_[layer] = TensorsOf(static_cast<int64_t>(layer), /*skeleton_rows=*/false);
  }
  if (!options_.spec.RequiredTensors().empty()) return;
  for (int64_t layer = 0; layer < options_.spec.geometry.layers; ++layer)
    complete_.push_back(layer);
}

std::map<engine::InputTensor, SessionModel::TensorBytes> SessionModel::TensorsOf(
    int64_t layer, bool skeleton_rows) const {
  std::map<engine::InputTensor, TensorBytes> tensors;
  const auto add = [&tensors](engine::InputTensor tensor, int64_t bytes) {
    const auto size = static_cast<size_t>(bytes);
    tensors[tensor] = {
        .bytes = std::string(size, '\0'), .came = std::vector<char>(size), .missing = bytes};
  };
  if (!options_.spec.has_input(layer)) return tensors;
  for (const engine::InputTensor tensor : options_.spec.RequiredTensors()) {
    add(tensor, skeleton_rows ? options_.spec.SkeletonInputBytes(tensor)
                              : options_.spec.InputBytes(tensor));
  }
  constexpr auto kPositions = engine::InputTensor::kPositions;
  if (skeleton_rows) add(kPositions, options_.spec.SkeletonInputBytes(kPositions));
  return tensors;
}

// The pivot is known, the layer comes after it, and nothing of it came.
bool SessionModel::MayBecomeSkeleton(int64_t layer) const {
  if (!pivot_ || !options_.skeleton_from.has_value() || layer < *options_.skeleton_from) {
    return false;
  }
  for (const auto& [tensor, model] : layers_[static_cast<size_t>(layer)]) {
    if (!model.pieces.empty()) return false;
  }
  return true;
}

// The tensor that the piece is of; null where there is none, or it is not its turn.
SessionModel::TensorBytes* SessionModel::Find(const PieceBytes& piece) {
  auto& tensors = layers_[static_cast<size_t>(piece.layer)];
  constexpr auto kPositions = engine::InputTensor::kPositions;
  if (skeleton_layers_.contains(piece.layer)) {
    if (piece.tensor != kPositions && tensors[kPositions].missing > 0) return nullptr;
  } else if (piece.tensor == kPositions) {
    if (!MayBecomeSkeleton(piece.layer)) return nullptr;
    skeleton_layers_.insert(piece.layer);
    tensors = TensorsOf(piece.layer, /*skeleton_rows=*/true);
  }
  const auto found = tensors.find(piece.tensor);
  return found == tensors.end() ? nullptr : &found->second;
}

bool SessionModel::IsComplete(int64_t layer) const {
  for (const auto& [tensor, model] : layers_[static_cast<size_t>(layer)]) {
    if (model.missing > 0) return false;
  }
  return true;
}

int64_t SessionModel::LowestUnfinished() const {
  int64_t layer = 0;
  while (layer < options_.spec.geometry.layers && IsFinished(layer)) ++layer;
  return layer;
}

bool SessionModel::output_full() const {
  const int64_t running = pulls_rows() && running_.has_value() ? options_.layer_output_bytes : 0;
  return unsent_bytes_ + running + options_.layer_output_bytes > options_.output_limit_bytes;
}

// Events

void SessionModel::Start() {
  if (ended()) return;
  state_ = State::kRunning;
  StartLayer();
  Ask();
  AtRest();
}

void SessionModel::Append(std::vector<PieceBytes> pieces) {
  if (ended()) return;
  asked_ = false;
  begun_by_last_message_ = false;
  if (state_ == State::kCommitted || pieces.empty()) {
    Refuse(absl::StatusCode::kInvalidArgument);
    return;
  }
  parked_.assign(pieces.begin(), pieces.end());
  TakeParked();
  AtRest();
}

void SessionModel::Commit(int64_t layers, int64_t input_bytes) {
  if (ended()) return;
  const int64_t all = options_.spec.geometry.layers;
  if (state_ == State::kCommitted || layers != all || LowestUnfinished() != all ||
      input_bytes != received_bytes_) {
    Refuse(absl::StatusCode::kInvalidArgument);
    return;
  }
  state_ = State::kCommitted;
  GoOn();
  AtRest();
}

void SessionModel::EndOfInput() {
  if (!ended() && state_ != State::kCommitted) Refuse(absl::StatusCode::kInvalidArgument);
}

void SessionModel::OutputSent(int64_t bytes) {
  unsent_bytes_ -= std::min(bytes, unsent_bytes_);
  if (ended()) {
    End(state_);
  } else {
    GoOn();
    AtRest();
  }
}

void SessionModel::Cancel() {
  unsent_bytes_ = 0;
  End(ended() ? state_ : State::kFailed);
}

void SessionModel::Fail(absl::StatusCode code) {
  if (!ended()) Refuse(code);
}

void SessionModel::OpenGate() {
  gate_open_ = true;
  AtRest();
}

// Input

SessionModel::Verdict SessionModel::Refuse(absl::StatusCode code) {
  failed_ = code;
  unsent_bytes_ = 0;
  End(State::kFailed);
  return Verdict::kRefused;
}

SessionModel::Verdict SessionModel::Take(const PieceBytes& piece) {
  if (piece.layer < 0 || piece.layer >= options_.spec.geometry.layers) {
    return Refuse(absl::StatusCode::kOutOfRange);
  }
  TensorBytes* const found = Find(piece);
  if (found == nullptr) return Refuse(absl::StatusCode::kInvalidArgument);
  TensorBytes& tensor = *found;
  const auto size = static_cast<int64_t>(piece.bytes.size());
  const auto whole = static_cast<int64_t>(tensor.bytes.size());
  if (size == 0 || piece.offset < 0 || piece.offset > whole || size > whole - piece.offset) {
    return Refuse(absl::StatusCode::kInvalidArgument);
  }
  const bool known = tensor.pieces.contains({piece.offset, size});
  const auto begin = tensor.came.begin() + piece.offset;
  if (!known) {
    if (std::find(begin, begin + size, 1) != begin + size || piece.layer >= window_end()) {
      return Refuse(absl::StatusCode::kInvalidArgument);
    }
    if (!holders_.contains(piece.layer) &&
        static_cast<int64_t>(holders_.size()) >= options_.layers_in_flight) {
      return Verdict::kNoBuffer;
    }
    holders_.insert(piece.layer);
  }
  const absl::Span<const std::byte> bytes(reinterpret_cast<const std::byte*>(piece.bytes.data()),
                                          piece.bytes.size());
  if (piece.xxh3_64.has_value() && *piece.xxh3_64 != wire::Checksum({bytes})) {
    return Refuse(absl::StatusCode::kDataLoss);
  }
  const auto at = static_cast<size_t>(piece.offset);
  if (known) {
    // Once the layer is complete, what came without a checksum is known by a sample.
    const bool decides = !options_.spec.pulls(piece.tensor);
    const bool complete = IsComplete(piece.layer) || (decides && pulled_.contains(piece.layer));
    const bool sampled = complete && !tensor.pieces[{piece.offset, size}];
    for (size_t i = 0; i < piece.bytes.size(); ++i) {
      if (sampled && i % 8192 >= 256) continue;
      if (tensor.bytes[at + i] != piece.bytes[i]) return Refuse(absl::StatusCode::kAlreadyExists);
    }
    return Verdict::kTaken;
  }
  if (piece.tensor == engine::InputTensor::kPositions) {
    const std::string skeleton(reinterpret_cast<const char*>(options_.skeleton.data()),
                               tensor.bytes.size());
    if (skeleton.compare(at, piece.bytes.size(), piece.bytes) != 0) {
      return Refuse(absl::StatusCode::kInvalidArgument);
    }
  }
  tensor.bytes.replace(at, piece.bytes.size(), piece.bytes);
  std::fill_n(begin, size, 1);
  tensor.missing -= size;
  tensor.pieces[{piece.offset, size}] = piece.xxh3_64.has_value();
  received_bytes_ += size;
  if (IsComplete(piece.layer)) {
    (pulled_.contains(piece.layer) ? complete_rows_ : complete_).push_back(piece.layer);
  }
  return Verdict::kTaken;
}

void SessionModel::TakeParked() {
  while (!parked_.empty()) {
    const Verdict verdict = Take(parked_.front());
    if (verdict == Verdict::kRefused) return;
    StartLayer();
    AnswerPulled();
    if (verdict == Verdict::kNoBuffer) return;
    parked_.pop_front();
  }
  Ask();
}

void SessionModel::Ask() {
  owes_ready_ = true;
  if (output_full() || state_ != State::kRunning) return;
  owes_ready_ = false;
  asked_ = true;
  ++ready_;
}

// Layers

void SessionModel::StartLayer() {
  if (running_.has_value() || output_full() || complete_.empty()) return;
  running_ = complete_.front();
  begun_by_last_message_ = true;
  complete_.pop_front();
}

// Whatever is being computed gets done, unless the gate holds it.
void SessionModel::AtRest() {
  while (running_.has_value() && (gate_open_ || !options_.gate_holds || !IsDisturbed(*running_))) {
    Answer();
  }
}

bool SessionModel::IsDisturbed(int64_t layer) const {
  return !skeleton_layers_.contains(layer) ||
         options_.spec.skeleton_tokens() == options_.spec.prompt_tokens;
}

void SessionModel::Answer() {
  const int64_t layer = *running_;
  running_.reset();
  if (ended()) {
    End(state_);
    return;
  }
  const auto bad = options_.bad_layers.find(layer);
  if (IsDisturbed(layer) && options_.failing_call == calls_++) {
    Refuse(absl::StatusCode::kInternal);
    return;
  }
  if (bad != options_.bad_layers.end()) {
    Refuse(bad->second);
    return;
  }
  computed_.push_back(static_cast<uint32_t>(layer));
  if (pulls_rows()) {
    Pull(layer);
  } else {
    holders_.erase(layer);
    answered_.push_back(static_cast<uint32_t>(layer));
    unsent_bytes_ += options_.output_bytes[static_cast<size_t>(layer)];
  }
  if (options_.spec.method.has_skeleton() && !pivot_) {
    int64_t needed = options_.decided_by_one_layer ? options_.decided_at : 0;
    for (const uint32_t each : computed_) {
      if (options_.decided_by_one_layer ? each == options_.decided_at
                                        : each <= options_.decided_at) {
        ++needed;
      }
    }
    if (needed == options_.decided_at + 1) {
      pivot_ = true;
      unsent_bytes_ += options_.pivot_bytes;
    }
  }
  StartLayer();
  GoOn();
}

// From now on the layer's rows may come.
void SessionModel::Pull(int64_t layer) {
  const auto index = static_cast<size_t>(layer);
  pulled_.insert(layer);
  pulls_.push_back(static_cast<uint32_t>(layer));
  unsent_bytes_ += options_.pull_bytes[index];
  for (const auto tensor : {engine::InputTensor::kKeys, engine::InputTensor::kValues}) {
    const int64_t bytes = options_.spec.PulledBytes(tensor, options_.kept_tokens[index]);
    if (bytes == 0) continue;
    const auto size = static_cast<size_t>(bytes);
    layers_[index][tensor] = {
        .bytes = std::string(size, '\0'), .came = std::vector<char>(size), .missing = bytes};
  }
}

void SessionModel::AnswerPulled() {
  while (!complete_rows_.empty() && !output_full()) {
    const int64_t layer = complete_rows_.front();
    complete_rows_.pop_front();
    holders_.erase(layer);
    answered_.push_back(static_cast<uint32_t>(layer));
    unsent_bytes_ += options_.output_bytes[static_cast<size_t>(layer)];
  }
}

void SessionModel::GoOn() {
  AnswerPulled();
  StartLayer();
  if (!parked_.empty()) {
    TakeParked();
    if (ended()) return;
  } else if (owes_ready_) {
    Ask();
  }
  if (state_ == State::kCommitted && answered_.size() == layers_.size()) End(State::kFinished);
}

// All memory goes, but for a layer that is being computed and, after a success, for results that
// were not sent.
void SessionModel::End(State state) {
  state_ = state;
  parked_.clear();
  complete_.clear();
  complete_rows_.clear();
  if (!running_.has_value() && unsent_bytes_ == 0) holds_memory_ = false;
}

}  // namespace structkv::session
