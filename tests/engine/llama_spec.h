// A spec of a well-known size that tests change one field of.
#pragma once

#include "kernels/backend.h"
#include "service/engine/prompt_spec.h"

namespace structkv::engine {

// Llama-3.1-8B's geometry at 131,072 tokens, with the method's defaults.
inline PromptSpec LlamaSpec(method::Method method = method::Method::kStructKv) {
  PromptSpec spec;
  spec.geometry = {
      .layers = 32, .query_heads = 32, .kv_heads = 8, .key_dim = 128, .value_dim = 128};
  spec.prompt_tokens = 131072;
  spec.method = method::MethodSpec::Defaults(method);
  spec.statistic = spec.method.needs_statistics() ? Statistic::kWindowQueries : Statistic::kNone;
  if (method == method::Method::kH2o) spec.statistic = Statistic::kSaliencyPerKvHead;
  spec.plan_only = method == method::Method::kGemFilter;
  spec.model_id = "llama";
  return spec;
}

inline BackendCapabilities AllCapabilities() {
  return {.dtypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3, DType::kF8E5M2},
          .layouts = {Layout::kHeadTokenDim, Layout::kTokenHeadDim},
          .paged = true};
}

}  // namespace structkv::engine
