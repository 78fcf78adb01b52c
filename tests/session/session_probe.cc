#include "tests/session/session_probe.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/str_join.h"
#include "tests/testing/engine_answer.h"

namespace structkv::session {

SessionCallbacks Probe::Callbacks() {
  const std::shared_ptr<Probe> self = shared_from_this();
  SessionCallbacks callbacks;
  callbacks.ready = [self] { self->Call([](Seen& seen) { ++seen.ready; }); };
  callbacks.layer = [self](const engine::LayerOutput& output) {
    self->Call([&](Seen& seen) {
      seen.unsent_bytes += OutputBytes(output);
      testkit::AddLayer(output, &seen.answer);
    });
  };
  callbacks.pivot = [self](const engine::PivotResult& result) {
    self->Call([&](Seen& seen) {
      seen.unsent_bytes += OutputBytes(result);
      testkit::AddPivot(result, &seen.answer);
    });
  };
  callbacks.pull = [self](const engine::RowPull& pull) {
    self->Call([&](Seen& seen) {
      seen.unsent_bytes += OutputBytes(pull);
      if (!seen.pulls.emplace(pull.layer, pull).second) {
        seen.faults.emplace_back("a layer was pulled twice");
      }
    });
  };
  callbacks.finished = [self](const SessionSummary& summary) {
    self->Call([&](Seen& seen) { seen.finished = summary; });
  };
  callbacks.failed = [self](const absl::Status& status) {
    self->Call([&](Seen& seen) { seen.failed = status; });
  };
  return callbacks;
}

void Probe::Call(const std::function<void(Seen&)>& record) {
  const bool overlaps = inside_.fetch_add(1) != 0;
  {
    const std::lock_guard lock(mutex_);
    if (overlaps) seen_.faults.emplace_back("two callbacks at once");
    if (seen_.finished.has_value() || seen_.failed.has_value()) {
      seen_.faults.emplace_back("a callback after the end");
    }
    record(seen_);
    changed_.notify_all();
  }
  inside_.fetch_sub(1);
}

Seen Probe::seen() const {
  const std::lock_guard lock(mutex_);
  Seen seen = seen_;
  seen.faults.insert(seen.faults.end(), seen.answer.faults.begin(), seen.answer.faults.end());
  return seen;
}

bool Probe::Is(const std::function<bool(const Seen&)>& condition) const {
  const std::lock_guard lock(mutex_);
  return condition(seen_);
}

bool Probe::WaitFor(const std::function<bool(const Seen&)>& condition) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::minutes(1), [&] { return condition(seen_); });
}

void Probe::Sent(int64_t bytes) {
  const std::lock_guard lock(mutex_);
  seen_.unsent_bytes -= bytes;
}

void MakeLarge(v1::Open* open) {
  open->mutable_geometry()->set_query_head_count(64);
  open->mutable_geometry()->set_key_dim(64);
  if (open->method().has_snapkv()) {
    open->mutable_method()->mutable_snapkv()->set_window_tokens(64);
  } else if (open->method().has_fastkv()) {
    open->mutable_method()->mutable_fastkv()->set_window_tokens(64);
  } else {
    open->mutable_method()->mutable_structkv()->set_window_tokens(64);
  }
}

v1::Tensor ProtoTensor(engine::InputTensor tensor) {
  switch (tensor) {
    case engine::InputTensor::kKeys:
      return v1::TENSOR_KEYS;
    case engine::InputTensor::kValues:
      return v1::TENSOR_VALUES;
    case engine::InputTensor::kWindowQueries:
      return v1::TENSOR_WINDOW_QUERIES;
    case engine::InputTensor::kWindowLse:
      return v1::TENSOR_WINDOW_LSE;
    case engine::InputTensor::kSaliency:
      return v1::TENSOR_SALIENCY;
    case engine::InputTensor::kPositions:
      return v1::TENSOR_POSITIONS;
    case engine::InputTensor::kKeyScales:
      return v1::TENSOR_KEY_SCALES;
    case engine::InputTensor::kValueScales:
      return v1::TENSOR_VALUE_SCALES;
  }
  return v1::TENSOR_UNSPECIFIED;
}

PieceBytes PieceOf(const testkit::PromptData& data, int64_t layer, engine::InputTensor tensor,
                   int64_t offset, int64_t size) {
  const std::string& all = data.tensor(static_cast<uint32_t>(layer), ProtoTensor(tensor));
  return {.layer = layer,
          .tensor = tensor,
          .offset = offset,
          .bytes = all.substr(static_cast<size_t>(offset), static_cast<size_t>(size))};
}

std::vector<PieceBytes> LayerPieces(const testkit::PromptData& data, const engine::PromptSpec& spec,
                                    int64_t layer) {
  std::vector<PieceBytes> pieces;
  for (const engine::InputTensor tensor : spec.RequiredTensors()) {
    pieces.push_back(PieceOf(data, layer, tensor, 0, spec.InputBytes(tensor)));
  }
  return pieces;
}

InputMessage MessageOf(const std::vector<PieceBytes>& pieces, size_t runs,
                       std::weak_ptr<const void>* owner) {
  const auto held = std::make_shared<std::vector<PieceBytes>>(pieces);
  InputMessage message;
  for (const PieceBytes& piece : *held) {
    InputPiece& input = message.pieces.emplace_back();
    input.layer = piece.layer;
    input.tensor = piece.tensor;
    input.offset_bytes = piece.offset;
    input.xxh3_64 = piece.xxh3_64;
    const absl::Span<const std::byte> all(reinterpret_cast<const std::byte*>(piece.bytes.data()),
                                          piece.bytes.size());
    const size_t run = all.size() / runs;
    for (size_t i = 0; i < runs; ++i) {
      input.data.push_back(i + 1 < runs ? all.subspan(i * run, run) : all.subspan(i * run));
    }
  }
  if (owner != nullptr) *owner = held;
  message.owner = held;
  return message;
}

absl::StatusOr<testkit::Answer> RunPrompt(SessionManager& manager, const testkit::PromptData& data,
                                          const SessionRequest& request) {
  const absl::StatusOr<std::shared_ptr<Session>> session = manager.Open(request);
  if (!session.ok()) return session.status();
  const auto probe = std::make_shared<Probe>();
  (*session)->Start(probe->Callbacks());
  const bool nothing_due = request.spec.RequiredTensors().empty();
  const int64_t messages = nothing_due ? 0 : request.spec.geometry.layers;
  for (int64_t sent = 0; sent <= messages;) {
    const bool called = probe->WaitFor([&](const Seen& seen) {
      return seen.ready > sent || seen.failed.has_value() || seen.unsent_bytes > 0;
    });
    if (!called) return absl::InternalError("the session asks for nothing");
    const Seen seen = probe->seen();
    if (seen.failed.has_value()) return *seen.failed;
    if (seen.unsent_bytes > 0) {
      probe->Sent(seen.unsent_bytes);
      (*session)->OutputSent(seen.unsent_bytes);
    }
    if (seen.ready <= sent) continue;
    if (sent < messages) (*session)->Append(MessageOf(LayerPieces(data, request.spec, sent), 2));
    ++sent;
  }
  (*session)->Commit(request.spec.geometry.layers, static_cast<int64_t>(data.total_bytes()));
  (*session)->EndOfInput();
  while (true) {
    const bool more = probe->WaitFor([](const Seen& seen) {
      return seen.finished.has_value() || seen.failed.has_value() || seen.unsent_bytes > 0;
    });
    if (!more) return absl::InternalError("the session does not end");
    Seen seen = probe->seen();
    if (!seen.faults.empty()) return absl::InternalError(absl::StrJoin(seen.faults, "; "));
    if (seen.failed.has_value()) return *seen.failed;
    probe->Sent(seen.unsent_bytes);
    (*session)->OutputSent(seen.unsent_bytes);
    if (seen.finished.has_value()) return std::move(seen.answer);
  }
}

std::string LayerBytes(const testkit::Answer& answer, uint32_t layer) {
  testkit::Answer one;
  one.layers[layer] = answer.layers.at(layer);
  return testkit::ResultBytes(one);
}

bool Eventually(const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return true;
}

}  // namespace structkv::session
