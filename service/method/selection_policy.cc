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
  }
  return nullptr;
}

}  // namespace structkv::method
