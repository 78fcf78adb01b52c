// The policies, one per method; made by MakeSelectionPolicy.
#pragma once

#include <memory>

#include "service/method/selection_policy.h"

namespace structkv::method {

std::unique_ptr<SelectionPolicy> MakeStructKvPolicy(const MethodSpec& spec);
std::unique_ptr<SelectionPolicy> MakeSnapKvPolicy(const MethodSpec& spec);
std::unique_ptr<SelectionPolicy> MakeStreamingLlmPolicy(const MethodSpec& spec);
std::unique_ptr<SelectionPolicy> MakeFullPolicy();
std::unique_ptr<SelectionPolicy> MakePyramidKvPolicy(const MethodSpec& spec);
std::unique_ptr<SelectionPolicy> MakeFastKvPolicy(const MethodSpec& spec);
std::unique_ptr<SelectionPolicy> MakeGemFilterPolicy(const MethodSpec& spec);
std::unique_ptr<SelectionPolicy> MakeH2oPolicy(const MethodSpec& spec);

}  // namespace structkv::method
