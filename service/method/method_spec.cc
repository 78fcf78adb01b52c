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
    case Method::kPyramidKv:
      return "pyramidkv";
    case Method::kFastKv:
      return "fastkv";
    case Method::kGemFilter:
      return "gemfilter";
    case Method::kH2o:
      return "h2o";
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
    case Method::kPyramidKv:
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
    case Method::kFastKv:
      spec.granularity = Granularity::kPerKvHead;
      spec.pooling = Pooling::kMax;
      spec.pooling_kernel = 7;
      break;
    case Method::kGemFilter:
      spec.window = 1;
      spec.pooling = Pooling::kAvg;
      break;
    case Method::kH2o:
      spec.window = 0;
      spec.granularity = Granularity::kPerKvHead;
      break;
  }
  return spec;
}

}  // namespace structkv::method
