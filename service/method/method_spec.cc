#include "service/method/method_spec.h"

namespace structkv::method {

std::string_view MethodName(Method method) {
  switch (method) {
    case Method::kStructKv:
      return "structkv";
    case Method::kSnapKv:
      return "snapkv";
    case Method::kStreamingLlm:
      return "streaming_llm";
    case Method::kFull:
      return "full";
  }
  return "?";
}

MethodSpec MethodSpec::Defaults(Method method) {
  MethodSpec spec;
  spec.method = method;
  switch (method) {
    case Method::kStructKv:
      break;
    case Method::kSnapKv:
      spec.window = 32;
      spec.granularity = Granularity::kPerKvHead;
      spec.pooling = Pooling::kAvg;
      spec.pooling_kernel = 5;
      break;
    case Method::kStreamingLlm:
      spec.window = 0;
      spec.sink_tokens = 4;
      break;
    case Method::kFull:
      spec.window = 0;
      spec.kv_budget.ratio = 1.0;
      break;
  }
  return spec;
}

}  // namespace structkv::method
