#include "service/method/selection_policy.h"

#include "service/method/policies.h"

namespace structkv::method {

std::unique_ptr<SelectionPolicy> MakeSelectionPolicy(const MethodSpec& spec) {
  switch (spec.method) {
    case Method::kStructKv:
      return MakeStructKvPolicy(spec);
    case Method::kSnapKv:
      return MakeSnapKvPolicy(spec);
    case Method::kStreamingLlm:
      return MakeStreamingLlmPolicy(spec);
    case Method::kFull:
      return MakeFullPolicy();
    case Method::kPyramidKv:
      return MakePyramidKvPolicy(spec);
    case Method::kFastKv:
      return MakeFastKvPolicy(spec);
    case Method::kGemFilter:
      return MakeGemFilterPolicy(spec);
    case Method::kH2o:
      return MakeH2oPolicy(spec);
  }
  return nullptr;
}

}  // namespace structkv::method
