// A prompt through a session, in any pieces and any order.
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

// Sends the messages as a good client would, and gives the answer. The session's error, or INTERNAL
// where a promise was broken.
absl::StatusOr<testkit::Answer> RunMessages(SessionManager& manager,
                                            const testkit::PromptData& data,
                                            const SessionRequest& request,
                                            const std::vector<std::vector<PieceBytes>>& messages,
                                            testkit::Random* random);

}  // namespace structkv::session
