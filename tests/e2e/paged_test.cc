// Keys and values in blocks: against the oracle, the same tokens as dense ones have, and what is
// refused.
#include <algorithm>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/v1/compression.grpc.pb.h"
#include "tests/e2e/send_cut.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

struct Way {
  std::string name;
  std::function<void(v1::Open*)> set;
};

void PrintTo(const Way& way, std::ostream* out) { *out << way.name; }

std::vector<Way> Ways() {
  return {
      {"StructKv", [](v1::Open* open) { open->set_return_saliency(true); }},
      {"StructKvPerHeadWithLse",
       [](v1::Open* open) {
         open->mutable_method()->mutable_structkv()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
         open->set_window_lse(true);
       }},
      {"SnapKvGroupMax",
       [](v1::Open* open) {
         open->mutable_method()->mutable_snapkv()->set_group_reduce(v1::GROUP_REDUCE_MAX);
         open->set_dtype(v1::DTYPE_F32);
       }},
      {"PyramidKv",
       [](v1::Open* open) {
         open->mutable_method()->mutable_pyramidkv()->mutable_kv_budget()->set_ratio(0.3);
       }},
      {"Mqa",
       [](v1::Open* open) {
         open->mutable_geometry()->set_kv_head_count(1);
         open->mutable_geometry()->set_value_dim(64);
         open->set_dtype(v1::DTYPE_F16);
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
      {"Fp8",
       [](v1::Open* open) {
         open->set_dtype(v1::DTYPE_F8_E4M3);
         open->set_kv_scales(v1::KV_SCALES_PER_KV_HEAD);
       }},
      {"GivenSaliency", [](v1::Open* open) { open->set_statistic(v1::STATISTIC_SALIENCY); }},
      {"KeepsAll",
       [](v1::Open* open) {
         open->mutable_method()->mutable_structkv()->mutable_kv_budget()->set_ratio(1);
       }},
      {"StreamingLlm", [](v1::Open* open) { open->mutable_method()->mutable_streaming_llm(); }},
      {"Full", [](v1::Open* open) { open->mutable_method()->mutable_full(); }},
      {"Plan", [](v1::Open* open) { open->set_output(v1::OUTPUT_PLAN); }},
  };
}

const auto kLayouts = ::testing::Values(v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM);

class PagedTest : public ServiceTest,
                  public ::testing::WithParamInterface<std::tuple<Way, v1::Layout, uint32_t>> {};

// The testkit fills every slot that holds no token with NaN.
TEST_P(PagedTest, MatchesTheOracle) {
  Start();
  const auto& [way, layout, block_tokens] = GetParam();
  // Whole blocks, one token more, and fewer tokens than a block or the window.
  for (const uint32_t tokens : {192U, 193U, 5U}) {
    SCOPED_TRACE(tokens);
    v1::Open open = SmallOpen(tokens);
    open.set_layout(layout);
    PageAtRandom(block_tokens, tokens % 2 * 3, tokens + block_tokens, &open);
    way.set(&open);
    const PromptData data(open, 51);
    ExpectSuccess(data, Run(AllMessages(data)));
  }
}

INSTANTIATE_TEST_SUITE_P(, PagedTest,
                         ::testing::Combine(::testing::ValuesIn(Ways()), kLayouts,
                                            ::testing::Values(16, 48, 512)),
                         [](const auto& instance) {
                           return std::get<0>(instance.param).name +
                                  (std::get<1>(instance.param) == v1::LAYOUT_HEAD_TOKEN_DIM
                                       ? "HeadFirst"
                                       : "TokenFirst") +
                                  std::to_string(std::get<2>(instance.param));
                         });

class PagedCutTest : public ServiceTest, public ::testing::WithParamInterface<v1::Layout> {};

TEST_P(PagedCutTest, SkeletonRowsComeInBlocksInOrder) {
  Start();
  for (const double kv_ratio : {0.1, 0.5}) {
    v1::Open open = SmallOpen(250);
    open.set_layout(GetParam());
    PageAtRandom(16, 2, 5, &open);
    v1::StructKvMethod* method = open.mutable_method()->mutable_structkv();
    method->mutable_kv_budget()->set_ratio(kv_ratio);  // 0.5: all of the skeleton
    method->mutable_pivot()->set_mode(v1::PIVOT_MODE_FIXED);
    method->mutable_pivot()->set_fixed_layer(1);
    PromptData data(open, 52);
    const Outcome outcome = SendCut(channel(), &data);
    EXPECT_EQ(data.rows(3).size(), 50);
    EXPECT_EQ(data.tensor(3, v1::TENSOR_KEYS).size(), 4 * 16 * 2 * 32 * 2) << "four blocks";
    ExpectSuccess(data, outcome);
  }
}

INSTANTIATE_TEST_SUITE_P(, PagedCutTest, kLayouts);

// `from` with its keys and values in another order of axes, or in blocks.
PromptData Rearranged(const PromptData& from, const v1::Open& open, uint64_t seed) {
  PromptData to(open, seed);
  const uint64_t heads = open.geometry().kv_head_count();
  for (uint32_t layer = 0; layer < to.layers(); ++layer) {
    for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
      const std::string& source = from.tensor(layer, tensor);
      std::string* out = to.mutable_tensor(layer, tensor);
      const uint64_t row = source.size() / heads / open.prompt_tokens();
      for (uint64_t head = 0; head < heads; ++head) {
        for (uint64_t token = 0; token < open.prompt_tokens(); ++token) {
          out->replace(to.RowIndex(layer, head, token) * row, row, source,
                       from.RowIndex(layer, head, token) * row, row);
        }
      }
    }
    for (const v1::Tensor tensor : {v1::TENSOR_WINDOW_QUERIES, v1::TENSOR_KEY_SCALES,
                                    v1::TENSOR_VALUE_SCALES, v1::TENSOR_WINDOW_LSE}) {
      *to.mutable_tensor(layer, tensor) = from.tensor(layer, tensor);
    }
  }
  return to;
}

struct Type {
  v1::DType dtype;
  v1::KvScales scales;
};

class SameTokensTest : public ServiceTest, public ::testing::WithParamInterface<Type> {};

// Positions, statistics, pivot and skeleton do not know how keys lie in memory.
TEST_P(SameTokensTest, DensePagedAndEveryOrderOfAxes) {
  Start();
  v1::Open base = SmallOpen(301);
  base.mutable_geometry()->set_query_head_count(8);
  base.set_dtype(GetParam().dtype);
  base.set_kv_scales(GetParam().scales);
  base.set_return_saliency(true);
  base.set_return_centrality(true);
  const PromptData dense(base, 53);
  // Of an answer, all but keys and values.
  const auto result = [&](const PromptData& data) {
    const Outcome outcome = Run(AllMessages(data));
    ExpectSuccess(data, outcome);
    Answer answer = Assemble(outcome);
    for (auto& [layer, of_layer] : answer.layers) {
      of_layer.tensors.erase(v1::TENSOR_KEYS);
      of_layer.tensors.erase(v1::TENSOR_VALUES);
    }
    answer.summary.reset();
    return ResultBytes(answer);
  };
  const std::string expected = result(dense);
  for (const v1::Layout layout : {v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM}) {
    for (const uint32_t block_tokens : {0U, 16U, 112U, 512U}) {
      SCOPED_TRACE(v1::Layout_Name(layout) + " " + std::to_string(block_tokens));
      v1::Open open = base;
      open.set_layout(layout);
      if (block_tokens > 0) PageAtRandom(block_tokens, 3, 7, &open);
      EXPECT_TRUE(result(Rearranged(dense, open, 1)) == expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, SameTokensTest,
                         ::testing::Values(Type{v1::DTYPE_F32, v1::KV_SCALES_NONE},
                                           Type{v1::DTYPE_F16, v1::KV_SCALES_NONE},
                                           Type{v1::DTYPE_BF16, v1::KV_SCALES_NONE},
                                           Type{v1::DTYPE_F8_E4M3, v1::KV_SCALES_PER_KV_HEAD},
                                           Type{v1::DTYPE_F8_E5M2, v1::KV_SCALES_PER_TENSOR}),
                         [](const auto& instance) {
                           return v1::DType_Name(instance.param.dtype).substr(6);
                         });

TEST_F(ServiceTest, WholeBlocksAreReservedAndCounted) {
  Start();
  v1::Open open = SmallOpen(161);
  PageAtRandom(32, 4, 9, &open);  // 6 blocks and 4 others
  const PromptData data(open, 54);
  const Outcome outcome = Run(AllMessages(data));
  ExpectSuccess(data, outcome);
  const Answer answer = Assemble(outcome);
  constexpr uint64_t kBlock = 32 * 2 * 32 * 2;
  EXPECT_EQ(answer.summary->input_bytes(), 4 * (2 * 10 * kBlock + 8 * 4 * 32 * 2));
  EXPECT_EQ(answer.summary->kv_length(), 17);
  EXPECT_EQ(answer.summary->kv_blocks(), 1);
  EXPECT_EQ(answer.layers.at(0).tensors.at(v1::TENSOR_KEYS).size(), kBlock);
  // Two layers of input, two of results.
  EXPECT_GT(answer.opened->reserved_bytes(), 2 * 2 * (10 + 1) * kBlock);
}

TEST_F(ServiceTest, NanInASlotOfThePromptIsNamed) {
  Start();
  v1::Open open = SmallOpen(100);
  PageAtRandom(16, 1, 11, &open);
  PromptData data(open, 55);
  // The last token, beside slots that hold NaN by right.
  SetElement(v1::DTYPE_BF16, std::numeric_limits<float>::quiet_NaN(),
             data.RowIndex(2, 1, 99) * 32 + 4, data.mutable_tensor(2, v1::TENSOR_KEYS));
  ExpectFailure(Run(AllMessages(data)), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 2: saliency of token 99 (KV head 1) is nan"});
  ExpectMemoryBack();
}

struct BadTable {
  std::string name;
  std::function<void(v1::PagedLayout*)> break_it;
  std::string text;
};

void PrintTo(const BadTable& bad, std::ostream* out) { *out << bad.name; }

class BadTableTest : public ServiceTest, public ::testing::WithParamInterface<BadTable> {};

TEST_P(BadTableTest, IsRefused) {
  Start();
  v1::Open open = SmallOpen(100);
  v1::PagedLayout* paged = open.mutable_paged();
  paged->set_block_tokens(16);
  paged->set_block_count(9);
  for (const uint32_t block : {8U, 1U, 0U, 4U, 7U, 3U, 2U}) paged->add_block_table(block);
  GetParam().break_it(paged);
  const Outcome outcome = Run({OpenMessage(open)});
  ExpectFailure(outcome, grpc::StatusCode::INVALID_ARGUMENT, {"open.paged." + GetParam().text});
  EXPECT_THAT(outcome.responses, ::testing::IsEmpty()) << "nothing may be opened";
  ExpectMemoryBack();
}

INSTANTIATE_TEST_SUITE_P(
    , BadTableTest,
    ::testing::Values(
        BadTable{"Empty", [](v1::PagedLayout* paged) { paged->Clear(); },
                 "block_tokens: 0 is not allowed; multiples of 16 in [16, 4096] are"},
        BadTable{"SmallBlocks", [](v1::PagedLayout* paged) { paged->set_block_tokens(8); },
                 "block_tokens: 8 is not allowed"},
        BadTable{"OddBlocks", [](v1::PagedLayout* paged) { paged->set_block_tokens(24); },
                 "block_tokens: 24 is not allowed"},
        BadTable{"LargeBlocks", [](v1::PagedLayout* paged) { paged->set_block_tokens(4112); },
                 "block_tokens: 4112 is not allowed"},
        BadTable{"MostBlockTokens",
                 [](v1::PagedLayout* paged) { paged->set_block_tokens(0xfffffff0); },
                 "block_tokens: 4294967280 is not allowed"},
        BadTable{"FewBlocks", [](v1::PagedLayout* paged) { paged->set_block_count(6); },
                 "block_count: 6 is out of range [7, 2147483647] for a prompt of 100 tokens"},
        BadTable{"MostBlocks", [](v1::PagedLayout* paged) { paged->set_block_count(0xffffffff); },
                 "block_count: 4294967295 is out of range [7, 2147483647]"},
        BadTable{"NoTable", [](v1::PagedLayout* paged) { paged->clear_block_table(); },
                 "block_table: 0 entries, but 100 tokens in blocks of 16 need 7"},
        BadTable{"ShortTable",
                 [](v1::PagedLayout* paged) { paged->mutable_block_table()->RemoveLast(); },
                 "block_table: 6 entries, but 100 tokens in blocks of 16 need 7"},
        BadTable{"LongTable", [](v1::PagedLayout* paged) { paged->add_block_table(5); },
                 "block_table: 8 entries, but 100 tokens in blocks of 16 need 7"},
        BadTable{"OutsideByOne", [](v1::PagedLayout* paged) { paged->set_block_table(3, 9); },
                 "block_table: entry 3 is block 9; blocks 0 to 8 are allowed"},
        BadTable{"FarOutside",
                 [](v1::PagedLayout* paged) { paged->set_block_table(6, 0xffffffff); },
                 "block_table: entry 6 is block 4294967295; blocks 0 to 8 are allowed"},
        BadTable{"Twice", [](v1::PagedLayout* paged) { paged->set_block_table(5, 1); },
                 "block_table: entries 1 and 5 are both block 1; a block may come once"}),
    [](const auto& instance) { return instance.param.name; });

// The largest pool that a table may speak of is more than there is memory for, not an overflow.
TEST_F(ServiceTest, AHugePoolIsRefused) {
  Start();
  v1::Open open = SmallOpen(100);
  PageAtRandom(4096, 0, 1, &open);
  for (const uint32_t blocks : {0x7fffffffU, 100000U}) {
    open.mutable_paged()->set_block_count(blocks);
    const Outcome outcome = Run({OpenMessage(open)});
    ExpectFailure(outcome, grpc::StatusCode::RESOURCE_EXHAUSTED, {"bytes of memory"});
    EXPECT_THAT(outcome.responses, ::testing::IsEmpty()) << "nothing may be opened";
    ExpectMemoryBack();
  }
}

TEST_F(ServiceTest, BlocksAreNotPulled) {
  Start();
  v1::Open open = SmallOpen(100);
  PageAtRandom(16, 0, 1, &open);
  open.set_pull(v1::PULL_VALUES);
  ExpectFailure(Run({OpenMessage(open)}), grpc::StatusCode::INVALID_ARGUMENT,
                {"open.pull: VALUES, but keys and values are paged"});
  ExpectMemoryBack();
}

TEST_F(ServiceTest, CapabilitiesNameTheBlocks) {
  StartAlone(TestOptions());
  v1::GetCapabilitiesResponse response;
  grpc::ClientContext context;
  ASSERT_TRUE(v1::Compression::NewStub(channel())->GetCapabilities(&context, {}, &response).ok());
  EXPECT_EQ(response.block_tokens().min(), 16);
  EXPECT_EQ(response.block_tokens().max(), 4096);
  EXPECT_EQ(response.block_tokens().step(), 16);
}

}  // namespace
}  // namespace structkv::testkit
