// The policies, one per method; made by MakeSelectionPolicy.
#pragma once

#include <memory>

#include "service/method/selection_policy.h"

namespace structkv::method {

std::unique_ptr<SelectionPolicy> MakeStructKvPolicy(const MethodSpec& spec);
std::unique_ptr<SelectionPolicy> MakeSnapKvPolicy(const MethodSpec& spec);
std::unique_ptr<SelectionPolicy> MakeStreamingLlmPolicy(const MethodSpec& spec);
std::unique_ptr<SelectionPolicy> MakeFullPolicy();

}  // namespace structkv::method
