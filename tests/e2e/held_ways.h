// The kinds of caches that are held: methods, types, layouts, dense and paged.
#pragma once

#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "tests/e2e/held_test.h"

namespace structkv::testkit {

struct Way {
  std::string name;
  std::function<void(v1::Open*)> set;
};

inline void PrintTo(const Way& way, std::ostream* out) { *out << way.name; }

inline std::vector<Way> Ways() {
  return {
      {"StructKv", [](v1::Open* open) { open->set_return_saliency(true); }},
      {"PerKvHead",
       [](v1::Open* open) {
         open->mutable_method()->mutable_structkv()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
         open->mutable_geometry()->set_value_dim(64);
         open->set_dtype(v1::DTYPE_F32);
       }},
      {"PyramidKv",
       [](v1::Open* open) {
         open->mutable_method()->mutable_pyramidkv()->mutable_kv_budget()->set_ratio(0.3);
       }},
      {"Mla",
       [](v1::Open* open) {
         open->mutable_geometry()->set_layer_count(3);
         open->mutable_geometry()->set_kv_head_count(1);
         open->mutable_geometry()->set_key_dim(576);
         open->mutable_geometry()->set_value_dim(512);
         open->mutable_geometry()->set_values_in_keys(true);
         open->set_attention_scale(0.0721687);
       }},
      {"Fp8PerKvHead",
       [](v1::Open* open) {
         open->set_dtype(v1::DTYPE_F8_E4M3);
         open->set_kv_scales(v1::KV_SCALES_PER_KV_HEAD);
       }},
      {"Fp8PerTensor",
       [](v1::Open* open) {
         open->set_dtype(v1::DTYPE_F8_E5M2);
         open->set_kv_scales(v1::KV_SCALES_PER_TENSOR);
       }},
      {"Rotary", [](v1::Open* open) { open->mutable_rotary()->set_rope_theta(10000); }},
      {"Full", [](v1::Open* open) { open->mutable_method()->mutable_full(); }},
  };
}

// Layout, and tokens of a block, 0 where keys and values are dense.
using HeldParam = std::tuple<Way, v1::Layout, uint32_t>;

inline auto HeldGrid() {
  return ::testing::Combine(::testing::ValuesIn(Ways()),
                            ::testing::Values(v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM),
                            ::testing::Values(0U, 16U));
}

inline std::string HeldName(const ::testing::TestParamInfo<HeldParam>& instance) {
  const auto& [way, layout, block] = instance.param;
  return way.name + (layout == v1::LAYOUT_HEAD_TOKEN_DIM ? "_HeadFirst" : "_TokenFirst") +
         (block == 0 ? "_Dense" : "_Paged");
}

inline v1::Open HeldOpen(const HeldParam& param) {
  const auto& [way, layout, block] = param;
  v1::Open open = WideOpen();
  open.set_layout(layout);
  way.set(&open);
  if (block != 0) PageAtRandom(block, 2, 5, &open);
  return open;
}

}  // namespace structkv::testkit
