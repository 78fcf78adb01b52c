// Random prompts: every method, parameter, statistic, geometry, element type and layout, from a
// seed.
#pragma once

#include <cstdint>
#include <vector>

#include "structkv/v1/compression.pb.h"
#include "tests/testing/numbers.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

// A valid `Open`. Small: the reference backend computes it in a few milliseconds.
v1::Open RandomOpen(Random* random);

// The method's `kv_budget`; null for Full.
v1::Budget* MutableBudget(v1::Method* method);

// Makes tokens before the window equal to others, so that their scores tie: the same key in every
// KV head, or the same saliency. Window log-sum-exps are made again.
void AddTies(PromptData* data, Random* random);

// The same prompt in the other layout.
PromptData InOtherLayout(const PromptData& data);

// [outer, inner, row bytes] to [inner, outer, row bytes].
std::string Transposed(const std::string& bytes, uint64_t outer, uint64_t inner);

}  // namespace structkv::testkit
