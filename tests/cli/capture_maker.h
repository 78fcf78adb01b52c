// Captured prefills of any shape, from synthetic prompts.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "client/cli/capture.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// Writes a capture of the prompt that testkit::PromptData makes of `open` (a method with window
// queries), with `future_tokens` tokens after it.
absl::Status WriteCapture(const std::string& path, const v1::Open& open, uint32_t future_tokens,
                          uint64_t seed);

// Writes a capture again with keys and values in float32, times their scales; its queries must be
// float32.
absl::Status WriteWidened(const Capture& capture, const std::string& path);

}  // namespace structkv::cli
