// Prompts of every kind: methods, statistics, outputs, layouts, element types and edge sizes.
#pragma once

#include <string>
#include <vector>

#include "structkv/v1/compression.pb.h"

namespace structkv::testkit {

struct PromptCase {
  std::string name;  // letters and digits
  v1::Open open;
};

// All valid, each small.
const std::vector<PromptCase>& PromptCases();

// One of them. Ends the program for an unknown name.
const PromptCase& FindCase(const std::string& name);

}  // namespace structkv::testkit
