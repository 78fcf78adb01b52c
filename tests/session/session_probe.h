// Records what a session answers, and hands it prompts. For tests of whole sessions.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "service/session/session.h"
#include "tests/testing/answer.h"
#include "tests/testing/prompt_data.h"

namespace structkv::session {

// What was called so far.
struct Seen {
  int ready = 0;
  testkit::Answer answer;                    // layers and pivot
  std::map<int64_t, engine::RowPull> pulls;  // by layer
  int64_t unsent_bytes = 0;                  // of results, less what Sent() took
  std::optional<SessionSummary> finished;
  std::optional<absl::Status> failed;
  std::vector<std::string> faults;  // broken promises of SessionCallbacks
};

// Thread-safe. Outlives the session's calls: callbacks hold a share of it.
class Probe : public std::enable_shared_from_this<Probe> {
 public:
  SessionCallbacks Callbacks();

  Seen seen() const;
  // Whether something holds now.
  bool Is(const std::function<bool(const Seen&)>& condition) const;
  // Waits for something to be seen; false after a minute.
  bool WaitFor(const std::function<bool(const Seen&)>& condition) const;
  // Bytes that are reported by OutputSent now.
  void Sent(int64_t bytes);

 private:
  // Runs `record` under the mutex, and notes calls that overlap or come after the end.
  void Call(const std::function<void(Seen&)>& record);

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  Seen seen_;
  std::atomic<int> inside_{0};
};

// A piece of a prompt, as bytes of its own.
struct PieceBytes {
  int64_t layer = 0;
  engine::InputTensor tensor = engine::InputTensor::kKeys;
  int64_t offset = 0;
  std::string bytes;
  std::optional<uint64_t> xxh3_64;
};

// So many queries that layers count as large, and are computed on the scheduler's threads however
// few the tokens are.
void MakeLarge(v1::Open* open);

v1::Tensor ProtoTensor(engine::InputTensor tensor);

// The tensor's bytes [offset, offset + size).
PieceBytes PieceOf(const testkit::PromptData& data, int64_t layer, engine::InputTensor tensor,
                   int64_t offset, int64_t size);

// Every tensor of a layer, whole.
std::vector<PieceBytes> LayerPieces(const testkit::PromptData& data, const engine::PromptSpec& spec,
                                    int64_t layer);

// The message that carries the pieces, each in `runs` runs of bytes. `owner` gets a weak share of
// what keeps them alive.
InputMessage MessageOf(const std::vector<PieceBytes>& pieces, size_t runs = 1,
                       std::weak_ptr<const void>* owner = nullptr);

// Runs a prompt to its end as a good client would, a layer a message, and gives the answer. The
// session's error, or INTERNAL where a promise was broken.
absl::StatusOr<testkit::Answer> RunPrompt(SessionManager& manager, const testkit::PromptData& data,
                                          const SessionRequest& request);

// One layer of an answer in the canonical form of ResultBytes.
std::string LayerBytes(const testkit::Answer& answer, uint32_t layer);

// Polls for at most a minute.
bool Eventually(const std::function<bool()>& condition);

}  // namespace structkv::session
