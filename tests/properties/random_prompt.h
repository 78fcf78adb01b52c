// Random prompts: every method, parameter, statistic, geometry, element type, layout and kind of
// blocks, from a seed.
#pragma once

#include <cstdint>

#include "structkv/v1/compression.pb.h"
#include "tests/testing/answer.h"
#include "tests/testing/numbers.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

// A valid `Open`. Small: the reference backend computes it in a few milliseconds.
v1::Open RandomOpen(Random* random);

// The method's `kv_budget`; null for Full.
v1::Budget* MutableBudget(v1::Method* method);

// Has keys and values lie in shuffled blocks of 16 tokens and more, and some others beside them.
void RandomBlocks(Random* random, v1::Open* open);

// Makes tokens before the window equal to others, so that their scores tie: the same key in every
// KV head, or the same saliency. Window log-sum-exps are made again.
void AddTies(PromptData* data, Random* random);

// The same prompt of full layers, its keys and values as the layout and the blocks of `open` have
// them; `open` says nothing else that is new.
PromptData Rearranged(const PromptData& data, const v1::Open& open);

// The answer to `from` as that to `to` has its rows.
Answer Rearranged(const Answer& answer, const v1::Open& from, const v1::Open& to);

}  // namespace structkv::testkit
