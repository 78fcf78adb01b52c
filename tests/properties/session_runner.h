// Prompts through sessions, in any pieces and any order.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "service/session/session.h"
#include "tests/session/session_probe.h"
#include "tests/testing/answer.h"
#include "tests/testing/numbers.h"
#include "tests/testing/prompt_data.h"

namespace structkv::session {

// The prompt's tensors in messages of random pieces: whole tensors, runs of bytes, single bytes.
// All layers mixed; needs layers_in_flight of all.
std::vector<std::vector<PieceBytes>> RandomMessages(const testkit::PromptData& data,
                                                    const engine::PromptSpec& spec,
                                                    testkit::Random* random);

// What one session is asked for and sent. `data` is that of its own heads.
struct SessionInput {
  const testkit::PromptData* data = nullptr;
  SessionRequest request;
  std::vector<std::vector<PieceBytes>> messages;
};

// Runs the sessions at once as good clients would, on one thread, whichever can go on at random,
// and gives their answers: alone, or all ranks of a group. An error of one of them, or INTERNAL
// where a promise was broken.
absl::StatusOr<std::vector<testkit::Answer>> RunSessions(SessionManager& manager,
                                                         const std::vector<SessionInput>& inputs,
                                                         testkit::Random* random);

}  // namespace structkv::session
