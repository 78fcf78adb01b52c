// The engine fed with a synthetic prompt, and its answers in the form that is compared with the
// oracle.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "service/engine/prompt.h"
#include "tests/testing/answer.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

// The spec of a prompt that is valid for every backend; ends the program for another.
engine::PromptSpec SpecOf(const v1::Open& open);

// A layer's tensors, copied to buffers of `pool`, and the tokens that it holds where they are not
// all. `data` outlives it.
engine::LayerInput InputOf(const PromptData& data, uint32_t layer, engine::BufferPool* pool);

// Adds an answer of the engine.
void AddLayer(const engine::LayerOutput& output, Answer* answer);
void AddPivot(const engine::PivotResult& result, Answer* answer);

// Layers 0 .. count - 1.
std::vector<uint32_t> InOrder(uint32_t count);

// What an engine::Prompt answers to the layers of `order`. Its own errors.
absl::StatusOr<Answer> CompressDirectly(const PromptData& data, const Backend& backend,
                                        engine::BufferPool* pool,
                                        const std::vector<uint32_t>& order, ParallelFor parallel);

}  // namespace structkv::testkit
