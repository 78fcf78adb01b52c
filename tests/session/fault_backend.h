// A backend that blocks or fails on demand, around a real one. Prompts are told apart by their
// number of tokens.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace structkv::session {

// What a test holds on to; the backend itself is the manager's. Thread-safe.
class Faults {
 public:
  // From now on a layer of such a prompt waits as soon as the backend is asked for its statistics
  // (or, where it has none, for its rows), until OpenGate().
  void CloseGate(int64_t tokens);
  void OpenGate(int64_t tokens);
  void OpenAllGates();
  // Returns once so many layers wait at the gate; false after a minute.
  bool WaitUntilBlocked(int64_t tokens, int layers = 1);
  // The saliency of such a prompt fails with `status` after `calls` that go well.
  void FailSaliency(int64_t tokens, int64_t calls, absl::Status status);
  // From now on the backend is lost: its Health() is `status`, which is not OK.
  void Lose(absl::Status status);

  // For the backend.
  void Pass(int64_t tokens);
  absl::Status SaliencyStatus(int64_t tokens);
  absl::Status Health();

 private:
  struct Rule {
    bool closed = false;
    int blocked = 0;
    int64_t calls_left = 0;
    absl::Status failure;
  };
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int64_t, Rule> rules_;
  absl::Status health_;
};

// Full, and plans of methods without statistics, ask the backend for nothing, so that no gate holds
// them.
std::unique_ptr<Backend> MakeFaultBackend(std::unique_ptr<Backend> real,
                                          std::shared_ptr<Faults> faults);

}  // namespace structkv::session
