// A prompt divided among the ranks of a tensor-parallel group, and its answer likewise.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/testing/answer.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

// The even division: ranks share KV heads where there are more of them. With both ranges set.
v1::ShardGroup EvenShardGroup(const v1::Open& open, uint32_t ranks, uint32_t index,
                              const std::string& id = "group");

// What each rank sends.
std::vector<PromptData> SplitByRanks(const PromptData& whole, uint32_t ranks,
                                     const std::string& id = "group");

// What a rank is to get where one stream of all heads gets `whole`. Without `opened` and `summary`.
Answer SliceAnswer(const v1::Open& open, const Answer& whole, const v1::ShardGroup& group);

// ResultBytes of the layers and the pivot alone.
std::string ResultBytesOfLayers(Answer answer);

}  // namespace structkv::testkit
