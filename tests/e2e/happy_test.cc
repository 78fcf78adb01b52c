// What a worker gets for good input: every method, type, layout and statistic against the oracle,
// and the same answer whatever the order, the cut and the company in which the tensors come.
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <ostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "grpcpp/create_channel.h"
#include "gtest/gtest.h"
#include "structkv/v1/compression.grpc.pb.h"
#include "tests/testing/health.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

struct MethodCase {
  std::string name;
  std::function<void(v1::Open*)> set;
};

void PrintTo(const MethodCase& method_case, std::ostream* out) { *out << method_case.name; }

std::vector<MethodCase> Methods() {
  return {
      {"Default", [](v1::Open*) {}},
      {"StructKvEverything",
       [](v1::Open* open) {
         open->set_return_saliency(true);
         open->set_return_centrality(true);
         v1::StructKvMethod* method = open->mutable_method()->mutable_structkv();
         method->mutable_kv_budget()->set_ratio(0.15);
         method->mutable_kv_budget()->set_kind(v1::BUDGET_KIND_WINDOW_ON_TOP);
         method->mutable_skeleton_budget()->set_ratio(0.3);
         method->mutable_skeleton_budget()->set_kind(v1::BUDGET_KIND_WINDOW_ON_TOP);
         method->set_window_tokens(5);
         method->set_pooling(v1::POOLING_MAX);
         method->set_pooling_kernel(7);
         method->set_decay(0.5);
         v1::Pivot* pivot = method->mutable_pivot();
         pivot->set_mode(v1::PIVOT_MODE_EXACT);
         pivot->set_sparsity_ratio(0.25);
         pivot->set_entropy_weight(1);
         pivot->set_sparsity_weight(0);
         pivot->set_variance_weight(0.25);
         pivot->set_search_begin(0);
         pivot->set_search_end(1);
       }},
      {"StructKvFixed",
       [](v1::Open* open) {
         v1::Pivot* pivot = open->mutable_method()->mutable_structkv()->mutable_pivot();
         pivot->set_mode(v1::PIVOT_MODE_FIXED);
         pivot->set_fixed_layer(2);
         open->set_return_centrality(true);
       }},
      {"StructKvOnline",
       [](v1::Open* open) {
         open->mutable_method()->mutable_structkv()->mutable_pivot()->set_mode(
             v1::PIVOT_MODE_ONLINE);
         open->set_return_centrality(true);
       }},
      {"StructKvOnlineEverything",
       [](v1::Open* open) {
         v1::Pivot* pivot = open->mutable_method()->mutable_structkv()->mutable_pivot();
         pivot->set_mode(v1::PIVOT_MODE_ONLINE);
         pivot->set_patience(1);
         pivot->set_deadline(1);
         pivot->set_confirm_score(0.1);
         pivot->set_search_begin(0);
       }},
      {"StructKvProfiledWithoutAProfile",
       [](v1::Open* open) {
         v1::Pivot* pivot = open->mutable_method()->mutable_structkv()->mutable_pivot();
         pivot->set_mode(v1::PIVOT_MODE_PROFILED);
         pivot->set_profile_min_prompts(1000000);
       }},
      {"StructKvPerHead",
       [](v1::Open* open) {
         open->mutable_method()->mutable_structkv()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
         open->set_return_saliency(true);
       }},
      {"StructKvWindowLse", [](v1::Open* open) { open->set_window_lse(true); }},
      {"StructKvKeepsAll",
       [](v1::Open* open) {
         open->mutable_method()->mutable_structkv()->mutable_kv_budget()->set_ratio(1);
       }},
      {"StructKvOnGivenSaliency",
       [](v1::Open* open) {
         open->set_statistic(v1::STATISTIC_SALIENCY);
         open->set_return_saliency(true);
       }},
      {"StructKvOnGivenSaliencyPerHead",
       [](v1::Open* open) {
         open->set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
         open->mutable_method()->mutable_structkv()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
       }},
      {"SnapKv", [](v1::Open* open) { open->mutable_method()->mutable_snapkv(); }},
      {"SnapKvPerLayerMax",
       [](v1::Open* open) {
         v1::SnapKvMethod* method = open->mutable_method()->mutable_snapkv();
         method->set_granularity(v1::GRANULARITY_PER_LAYER);
         method->set_pooling(v1::POOLING_MAX);
         method->set_window_tokens(64);
         method->mutable_kv_budget()->set_ratio(0.5);
       }},
      {"SnapKvOnGivenSaliency",
       [](v1::Open* open) {
         open->mutable_method()->mutable_snapkv()->set_pooling(v1::POOLING_MAX);
         open->set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
       }},
      {"StreamingLlm", [](v1::Open* open) { open->mutable_method()->mutable_streaming_llm(); }},
      {"StreamingLlmSinks",
       [](v1::Open* open) {
         v1::StreamingLlmMethod* method = open->mutable_method()->mutable_streaming_llm();
         method->set_sink_tokens(40);
         method->mutable_kv_budget()->set_ratio(0.3);
       }},
      {"Full", [](v1::Open* open) { open->mutable_method()->mutable_full(); }},
      {"StructKvGroupMax",
       [](v1::Open* open) {
         open->mutable_method()->mutable_structkv()->set_group_reduce(v1::GROUP_REDUCE_MAX);
         open->set_return_saliency(true);
         open->set_return_centrality(true);
         open->set_window_lse(true);
       }},
      {"SnapKvWindowMax",
       [](v1::Open* open) {
         open->mutable_method()->mutable_snapkv()->set_window_reduce(v1::WINDOW_REDUCE_MAX);
         open->set_return_saliency(true);
       }},
      {"StructKvWindowSum",
       [](v1::Open* open) {
         open->mutable_method()->mutable_structkv()->set_window_reduce(v1::WINDOW_REDUCE_SUM);
         open->set_return_saliency(true);
         open->set_return_centrality(true);
       }},
      {"SnapKvGroupMean",
       [](v1::Open* open) {
         open->mutable_method()->mutable_snapkv()->set_group_reduce(v1::GROUP_REDUCE_MEAN);
         open->set_return_saliency(true);
       }},
      {"SnapKvKvpress",
       [](v1::Open* open) {
         v1::SnapKvMethod* method = open->mutable_method()->mutable_snapkv();
         method->mutable_kv_budget()->set_ratio(0.5);
         method->mutable_kv_budget()->set_kind(v1::BUDGET_KIND_KVPRESS);
       }},
      {"PyramidKv",
       [](v1::Open* open) {
         v1::PyramidKvMethod* method = open->mutable_method()->mutable_pyramidkv();
         method->mutable_kv_budget()->set_ratio(0.3);
         open->set_return_saliency(true);
       }},
      {"PyramidKvSteepPerLayer",
       [](v1::Open* open) {
         v1::PyramidKvMethod* method = open->mutable_method()->mutable_pyramidkv();
         method->mutable_kv_budget()->set_ratio(0.7);
         method->set_window_tokens(5);
         method->set_granularity(v1::GRANULARITY_PER_LAYER);
         method->set_pooling(v1::POOLING_MAX);
         method->set_beta(100);
       }},
      {"FastKv",
       [](v1::Open* open) {
         open->mutable_method()->mutable_fastkv()->set_tsp_layer(2);
         open->set_return_saliency(true);
       }},
      {"FastKvOnGivenSaliencyPerLayer",
       [](v1::Open* open) {
         v1::FastKvMethod* method = open->mutable_method()->mutable_fastkv();
         method->set_tsp_layer(0);
         method->set_granularity(v1::GRANULARITY_PER_LAYER);
         method->set_pooling(v1::POOLING_NONE);
         method->mutable_skeleton_budget()->set_ratio(0.4);
         open->set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
       }},
      {"H2o", [](v1::Open* open) { open->mutable_method()->mutable_h2o(); }},
      {"H2oPerLayer",
       [](v1::Open* open) {
         v1::H2oMethod* method = open->mutable_method()->mutable_h2o();
         method->set_recent_share(0.1);
         method->mutable_kv_budget()->set_ratio(0.33);
         open->set_statistic(v1::STATISTIC_SALIENCY);
         open->set_return_saliency(true);
       }},
  };
}

using HappyCase = std::tuple<MethodCase, v1::DType, v1::Layout, v1::Output>;

class HappyTest : public ServiceTest, public ::testing::WithParamInterface<HappyCase> {};

TEST_P(HappyTest, MatchesTheOracle) {
  const auto& [method, dtype, layout, output] = GetParam();
  StartAlone(TestOptions());
  v1::Open open = SmallOpen(211);
  open.mutable_geometry()->set_layer_count(6);
  open.mutable_geometry()->set_value_dim(64);
  open.set_dtype(dtype);
  open.set_layout(layout);
  open.set_output(output);
  method.set(&open);
  const PromptData data(open, 42);
  ExpectSuccess(data, Run(AllMessages(data)));
}

INSTANTIATE_TEST_SUITE_P(
    , HappyTest,
    ::testing::Combine(::testing::ValuesIn(Methods()),
                       ::testing::Values(v1::DTYPE_F32, v1::DTYPE_F16, v1::DTYPE_BF16),
                       ::testing::Values(v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM),
                       ::testing::Values(v1::OUTPUT_COMPACT, v1::OUTPUT_PLAN)),
    [](const ::testing::TestParamInfo<HappyCase>& instance) {
      return std::get<0>(instance.param).name + "_" +
             v1::DType_Name(std::get<1>(instance.param)).substr(6) + "_" +
             (std::get<2>(instance.param) == v1::LAYOUT_HEAD_TOKEN_DIM ? "HeadFirst"
                                                                       : "TokenFirst") +
             "_" + v1::Output_Name(std::get<3>(instance.param)).substr(7);
    });

// Prompts as short as they come: shorter than the window, everything is kept.
class ShortPromptTest : public ServiceTest, public ::testing::WithParamInterface<uint32_t> {};

TEST_P(ShortPromptTest, KeepsEverythingUpToTheWindow) {
  StartAlone(TestOptions());
  for (const MethodCase& method : Methods()) {
    SCOPED_TRACE(method.name);
    v1::Open open = SmallOpen(GetParam());
    method.set(&open);
    const PromptData data(open, 3);
    const Outcome outcome = Run(AllMessages(data));
    ExpectSuccess(data, outcome);
    if (GetParam() <= 4 && !open.method().has_h2o()) {
      EXPECT_EQ(Assemble(outcome).summary.value_or(v1::Summary()).kv_length(), GetParam());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, ShortPromptTest, ::testing::Values(1, 2, 4, 7, 8, 9, 33));

// The one method whose layers need nothing but for one; its output is a plan always.
class GemFilterTest : public ServiceTest,
                      public ::testing::WithParamInterface<std::tuple<uint32_t, v1::Statistic>> {};

TEST_P(GemFilterTest, TheFilterLayerChoosesForAll) {
  Start();
  const auto& [layer, statistic] = GetParam();
  v1::Open open = SmallOpen(211);
  open.mutable_method()->mutable_gemfilter()->set_filter_layer(layer);
  open.set_output(v1::OUTPUT_PLAN);
  open.set_statistic(statistic);
  open.set_return_saliency(true);
  open.set_layers_in_flight(1);
  const PromptData data(open, 5);
  const Outcome outcome = Run(AllMessages(data));
  ExpectSuccess(data, outcome);
  const Answer answer = Assemble(outcome);
  ASSERT_TRUE(answer.pivot.has_value());
  EXPECT_EQ(AsInts(answer.pivot->tensors.at(v1::TENSOR_SKELETON_POSITIONS)),
            AsInts(answer.layers.at(layer).tensors.at(v1::TENSOR_POSITIONS)));
}

INSTANTIATE_TEST_SUITE_P(, GemFilterTest,
                         ::testing::Combine(::testing::Values(0, 2, 3),
                                            ::testing::Values(v1::STATISTIC_WINDOW_QUERIES,
                                                              v1::STATISTIC_SALIENCY,
                                                              v1::STATISTIC_SALIENCY_PER_KV_HEAD)));

TEST_F(ServiceTest, GemFilterTakesNoTensorOfAnotherLayer) {
  Start();
  v1::Open open = SmallOpen(211);
  open.mutable_method()->mutable_gemfilter()->set_filter_layer(2);
  open.set_output(v1::OUTPUT_PLAN);
  const PromptData data(open, 5);
  v1::TensorPiece piece = MakePiece(data, 2, v1::TENSOR_KEYS);
  piece.set_layer(1);
  const Outcome outcome = Run({OpenMessage(open), PieceMessage(std::move(piece))});
  ExpectFailure(outcome, grpc::StatusCode::INVALID_ARGUMENT, {"layer 1", "needs no tensor"});
}

struct ShapeCase {
  std::string name;
  uint32_t layers, query_heads, kv_heads, key_dim, value_dim, tokens;
};

void PrintTo(const ShapeCase& shape, std::ostream* out) { *out << shape.name; }

class ShapeTest : public ServiceTest, public ::testing::WithParamInterface<ShapeCase> {};

TEST_P(ShapeTest, MatchesTheOracle) {
  StartAlone(TestOptions());
  const ShapeCase& shape = GetParam();
  v1::Open open = SmallOpen(shape.tokens);
  open.mutable_geometry()->set_layer_count(shape.layers);
  open.mutable_geometry()->set_query_head_count(shape.query_heads);
  open.mutable_geometry()->set_kv_head_count(shape.kv_heads);
  open.mutable_geometry()->set_key_dim(shape.key_dim);
  open.mutable_geometry()->set_value_dim(shape.value_dim);
  const PromptData data(open, 8);
  ExpectSuccess(data, Run(AllMessages(data)));
}

INSTANTIATE_TEST_SUITE_P(, ShapeTest,
                         ::testing::Values(ShapeCase{"OneLayer", 1, 4, 2, 32, 0, 100},
                                           ShapeCase{"TwoLayers", 2, 4, 2, 32, 0, 100},
                                           ShapeCase{"ThreeLayers", 3, 4, 2, 32, 0, 100},
                                           ShapeCase{"ManyLayers", 40, 2, 1, 32, 0, 50},
                                           ShapeCase{"NoGroups", 3, 4, 4, 64, 0, 100},
                                           ShapeCase{"WideGroup", 3, 16, 1, 80, 0, 100},
                                           ShapeCase{"Llama", 2, 32, 8, 128, 0, 300},
                                           ShapeCase{"Wide", 2, 2, 1, 256, 32, 77},
                                           ShapeCase{"Latent", 2, 16, 1, 576, 512, 130}),
                         [](const auto& instance) { return instance.param.name; });

// The same prompt sent in other ways has the same result, to the byte.
class SendingTest : public ServiceTest {
 protected:
  SendingTest() : data_(SendingOpen(), 21) {}

  static v1::Open SendingOpen() {
    v1::Open open = SmallOpen(500);
    open.mutable_geometry()->set_layer_count(6);
    open.set_return_saliency(true);
    open.set_return_centrality(true);
    return open;
  }

  std::string Expected() {
    const Outcome outcome = Run(AllMessages(data_));
    ExpectSuccess(data_, outcome);
    return ResultBytes(Assemble(outcome));
  }

  // Every tensor of `layers`, cut into pieces of up to `most` bytes, in random order.
  std::vector<v1::TensorPiece> Shuffled(const std::vector<uint32_t>& layers, int64_t most,
                                        Random* random) {
    std::vector<v1::TensorPiece> pieces;
    for (const uint32_t layer : layers) {
      for (const v1::Tensor tensor : data_.effective().tensors) {
        const uint64_t size = data_.tensor(layer, tensor).size();
        for (uint64_t at = 0; at < size;) {
          const uint64_t length =
              std::min<uint64_t>(size - at, static_cast<uint64_t>(random->Between(1, most)));
          pieces.push_back(MakePiece(data_, layer, tensor, at, length));
          at += length;
        }
      }
    }
    for (size_t i = pieces.size(); i > 1; --i) {
      std::swap(pieces[i - 1], pieces[random->Between(0, static_cast<int64_t>(i) - 1)]);
    }
    return pieces;
  }

  // Messages of one to five pieces each.
  std::vector<v1::CompressRequest> Pack(const std::vector<v1::TensorPiece>& pieces,
                                        Random* random) {
    std::vector<v1::CompressRequest> messages;
    for (size_t i = 0; i < pieces.size();) {
      v1::CompressRequest& message = messages.emplace_back();
      for (int64_t n = random->Between(1, 5); n > 0 && i < pieces.size(); --n) {
        *message.mutable_pieces()->add_pieces() = pieces[i++];
      }
    }
    return messages;
  }

  PromptData data_;
};

TEST_F(SendingTest, PiecesInAnyOrderAndSize) {
  Start();
  const std::string expected = Expected();
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    std::vector<v1::CompressRequest> messages = {OpenMessage(data_.open())};
    for (uint32_t layer = 0; layer < data_.layers(); ++layer) {
      const int64_t most = seed % 2 == 0 ? 3000 : 40000;
      for (auto& message : Pack(Shuffled({layer}, most, &random), &random)) {
        messages.push_back(std::move(message));
      }
    }
    messages.push_back(CommitMessage(data_));
    const Answer answer = Assemble(Run(messages));
    EXPECT_THAT(answer.faults, ::testing::IsEmpty());
    EXPECT_TRUE(ResultBytes(answer) == expected);
  }
}

TEST_F(SendingTest, LayersInterleaved) {
  Start();
  const std::string expected = Expected();
  for (const uint32_t in_flight : {1U, 2U, 3U, 6U}) {
    SCOPED_TRACE(in_flight);
    Random random(in_flight);
    v1::Open open = data_.open();
    open.set_layers_in_flight(in_flight);
    std::vector<v1::CompressRequest> messages = {OpenMessage(open)};
    for (uint32_t layer = 0; layer < data_.layers(); layer += in_flight) {
      std::vector<uint32_t> layers;
      for (uint32_t l = layer; l < std::min(data_.layers(), layer + in_flight); ++l) {
        layers.push_back(l);
      }
      for (auto& message : Pack(Shuffled(layers, 9000, &random), &random)) {
        messages.push_back(std::move(message));
      }
    }
    messages.push_back(CommitMessage(data_));
    const Outcome outcome = Run(messages);
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    const Answer answer = Assemble(outcome);
    EXPECT_THAT(answer.faults, ::testing::IsEmpty());
    EXPECT_EQ(answer.opened.value_or(v1::Opened()).layers_in_flight(), in_flight);
    EXPECT_TRUE(ResultBytes(answer) == expected);
  }
}

// The later of two layers may be complete first; it is then answered first.
TEST_F(SendingTest, LayersAreAnsweredAsTheyBecomeComplete) {
  Start();
  const std::string expected = Expected();
  Call call(channel());
  call.Send(OpenMessage(data_.open()));
  call.Send(LayerMessage(data_, 1));
  ASSERT_TRUE(call.WaitForLayer(1));
  for (const uint32_t layer : {0U, 2U, 3U, 4U, 5U}) call.Send(LayerMessage(data_, layer));
  call.Send(CommitMessage(data_));
  call.HalfClose();
  const Answer answer = Assemble(call.Finish());
  EXPECT_THAT(answer.order, ::testing::ElementsAre(1, 0, 2, 3, 4, 5));
  EXPECT_TRUE(ResultBytes(answer) == expected);
}

TEST_F(SendingTest, PiecesSentTwiceAreIgnored) {
  Start();
  const std::string expected = Expected();
  std::vector<v1::CompressRequest> messages = {OpenMessage(data_.open())};
  for (uint32_t layer = 0; layer < data_.layers(); ++layer) {
    messages.push_back(PieceMessage(MakePiece(data_, layer, v1::TENSOR_KEYS)));
    messages.push_back(messages.back());
    messages.push_back(PieceMessage(MakePiece(data_, layer, v1::TENSOR_VALUES, 0, 1000)));
    messages.push_back(messages.back());
    messages.push_back(
        PieceMessage(MakePiece(data_, layer, v1::TENSOR_VALUES, 1000, std::string::npos)));
    messages.push_back(PieceMessage(MakePiece(data_, layer, v1::TENSOR_WINDOW_QUERIES)));
    // The layer is complete and may be answered already.
    messages.push_back(messages.back());
  }
  messages.push_back(CommitMessage(data_));
  const Outcome outcome = Run(messages);
  EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_TRUE(ResultBytes(Assemble(outcome)) == expected);
}

TEST_F(SendingTest, ResultsComeBeforeTheCommit) {
  Start();
  Call call(channel());
  call.Send(OpenMessage(data_.open()));
  for (uint32_t layer = 0; layer < data_.layers(); ++layer) {
    call.Send(LayerMessage(data_, layer));
    EXPECT_TRUE(call.WaitForLayer(layer));
  }
  call.Send(CommitMessage(data_));
  call.HalfClose();
  const Outcome outcome = call.Finish();
  ExpectSuccess(data_, outcome);
  EXPECT_EQ(Assemble(outcome).layers_before_pivot, 5U) << "before the last layer's answer";
}

TEST_F(SendingTest, FixedPivotComesWithItsLayer) {
  Start();
  v1::Open open = data_.open();
  v1::Pivot* pivot = open.mutable_method()->mutable_structkv()->mutable_pivot();
  pivot->set_mode(v1::PIVOT_MODE_FIXED);
  pivot->set_fixed_layer(2);
  const PromptData data(open, 21);
  const Outcome outcome = Run(AllMessages(data));
  ExpectSuccess(data, outcome);
  EXPECT_EQ(Assemble(outcome).layers_before_pivot, 2U);
}

TEST_F(SendingTest, AnswersAreCutToTheCallersLimit) {
  Start();
  const std::string expected = Expected();
  v1::Open open = data_.open();
  open.set_max_response_message_bytes(64 << 10);
  open.mutable_method()->mutable_structkv()->mutable_kv_budget()->set_ratio(1);
  const PromptData data(open, 21);
  const Outcome outcome = Run(AllMessages(data));
  ExpectSuccess(data, outcome);
  size_t longest = 0;
  for (const v1::CompressResponse& response : outcome.responses) {
    longest = std::max(longest, response.ByteSizeLong());
  }
  EXPECT_LE(longest, 64U << 10);
  EXPECT_GT(outcome.responses.size(), 6U * 2) << "a layer of 128 KiB cannot fit into one message";
}

TEST_F(SendingTest, ManyPromptsAtOnce) {
  Start();
  constexpr int kThreads = 8;
  constexpr int kPrompts = 5;
  std::vector<PromptData> prompts;
  const std::vector<MethodCase> methods = Methods();
  for (int i = 0; i < kThreads; ++i) {
    v1::Open open = SmallOpen(150 + 40 * i);
    methods[i % methods.size()].set(&open);
    prompts.emplace_back(open, 100 + i);
  }
  std::vector<std::string> alone;
  for (const PromptData& prompt : prompts) {
    const Outcome outcome = Run(AllMessages(prompt));
    ExpectSuccess(prompt, outcome);
    alone.push_back(ResultBytes(Assemble(outcome)));
  }
  std::vector<std::thread> threads;
  std::vector<int> good(kThreads);
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      const auto own = i % 2 == 0 ? channel() : NewChannel(target());
      for (int n = 0; n < kPrompts; ++n) {
        const Outcome outcome = testkit::Run(own, AllMessages(prompts[i]));
        good[i] += outcome.status.ok() && ResultBytes(Assemble(outcome)) == alone[i] ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(good, ::testing::Each(kPrompts));
}

TEST_F(SendingTest, FingerprintTellsMethodsApart) {
  Start();
  std::map<std::string, std::string> names;
  for (const MethodCase& method : Methods()) {
    v1::Open open = SmallOpen();
    method.set(&open);
    const PromptData data(open, 1);
    const Answer answer = Assemble(Run(AllMessages(data)));
    ASSERT_TRUE(answer.summary.has_value()) << method.name;
    const Answer again = Assemble(Run(AllMessages(data)));
    EXPECT_EQ(answer.summary->fingerprint(), again.opened.value_or(v1::Opened()).fingerprint());
    // Who computes the same statistics is not part of the cache's identity.
    const bool transport = method.name == "StructKvWindowLse" ||
                           method.name.find("OnGivenSaliency") != std::string::npos;
    EXPECT_TRUE(names.emplace(answer.summary->fingerprint(), method.name).second || transport)
        << method.name << " and " << names[answer.summary->fingerprint()];
  }
}

class ServiceTestPlain : public ServiceTest {};

// The generated stub and nothing else, as any user of the proto would write it.
TEST_F(ServiceTestPlain, GeneratedStub) {
  Start();
  const PromptData data(SmallOpen(), 1);
  const auto stub = v1::Compression::NewStub(channel());
  grpc::ClientContext context;
  const auto stream = stub->Compress(&context);
  for (const v1::CompressRequest& message : AllMessages(data)) {
    ASSERT_TRUE(stream->Write(message));
  }
  stream->WritesDone();
  Outcome outcome;
  for (v1::CompressResponse response; stream->Read(&response);)
    outcome.responses.push_back(response);
  outcome.status = stream->Finish();
  ExpectSuccess(data, outcome);
}

TEST_F(ServiceTestPlain, Capabilities) {
  Start();
  const auto stub = v1::Compression::NewStub(channel());
  grpc::ClientContext context;
  v1::GetCapabilitiesResponse response;
  const grpc::Status status = stub->GetCapabilities(&context, {}, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_FALSE(response.version().empty());
  ASSERT_GE(response.backends_size(), 1);
  EXPECT_EQ(response.backends(0).name(), server().sessions().backend().name());
  EXPECT_GE(response.backends(0).devices_size(), 1);
  EXPECT_THAT(response.dtypes(),
              ::testing::UnorderedElementsAre(v1::DTYPE_F32, v1::DTYPE_F16, v1::DTYPE_BF16,
                                              v1::DTYPE_F8_E4M3, v1::DTYPE_F8_E5M2));
  EXPECT_THAT(response.layouts(), ::testing::UnorderedElementsAre(v1::LAYOUT_HEAD_TOKEN_DIM,
                                                                  v1::LAYOUT_TOKEN_HEAD_DIM));
  EXPECT_THAT(response.methods(),
              ::testing::UnorderedElementsAre("structkv", "snapkv", "streaming_llm", "full",
                                              "pyramidkv", "fastkv", "gemfilter", "h2o"));
  EXPECT_THAT(response.statistics(), ::testing::SizeIs(4));
  EXPECT_THAT(response.pivot_modes(),
              ::testing::UnorderedElementsAre(v1::PIVOT_MODE_EXACT, v1::PIVOT_MODE_FIXED,
                                              v1::PIVOT_MODE_ONLINE, v1::PIVOT_MODE_PROFILED));
  EXPECT_THAT(response.transports(), ::testing::ElementsAre("inline"));
  EXPECT_EQ(response.key_dims().min(), 32U);
  EXPECT_EQ(response.key_dims().max(), 256U);
  EXPECT_THAT(response.key_dims().extra(), ::testing::Contains(576));
  const v1::Limits& limits = response.limits();
  EXPECT_EQ(limits.max_message_bytes(), 4U << 20);
  EXPECT_EQ(limits.max_window_tokens(), 64U);
  EXPECT_EQ(limits.memory_budget_bytes(), 256U << 20);
  EXPECT_EQ(limits.memory_available_bytes(),
            (256U << 20) - static_cast<uint64_t>(neighbour_bytes()));
  EXPECT_GT(limits.max_prompt_tokens(), 0U);
  EXPECT_GT(limits.max_layers(), 0U);
  EXPECT_GT(limits.max_heads(), 0U);
  EXPECT_GT(limits.max_sessions(), 0U);
}

TEST_F(ServiceTestPlain, HealthAndReflection) {
  Start();
  EXPECT_EQ(Health(channel()), "SERVING");
  EXPECT_EQ(Health(channel(), "structkv.v1.Compression"), "SERVING");
  EXPECT_EQ(Health(channel(), "nobody").substr(0, 2), "5:");  // NOT_FOUND
  EXPECT_THAT(ReflectedServices(channel()), ::testing::HasSubstr("structkv.v1.Compression"));
}

TEST_F(ServiceTestPlain, UnixSocketAndManyAddresses) {
  const TemporaryDirectory directory;
  ServerOptions options = TestOptions();
  options.listen.push_back("unix:" + directory.Path("socket"));
  Start(options);
  const PromptData data(SmallOpen(), 1);
  ExpectSuccess(data, testkit::Run(NewChannel(options.listen[1]), AllMessages(data)));
  ExpectSuccess(data, Run(AllMessages(data)));
}

TEST_F(ServiceTestPlain, PrivateChannelOfAServerThatListensNowhere) {
  ServerOptions options = TestOptions();
  options.listen.clear();
  auto server = Server::Start(options);
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_TRUE((*server)->addresses().empty());
  EXPECT_EQ((*server)->port(), 0);
  const auto first = (*server)->PrivateChannel({});
  const auto second = (*server)->PrivateChannel({});
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  const PromptData data(SmallOpen(), 1);
  for (int i = 0; i < 20; ++i) ExpectSuccess(data, testkit::Run(*first, AllMessages(data)));
  ExpectSuccess(data, testkit::Run(*second, AllMessages(data)));
  (*server)->Shutdown();
  EXPECT_EQ(testkit::Run(*first, AllMessages(data)).status.error_code(),
            grpc::StatusCode::UNAVAILABLE);
}

// A server that is gone is UNAVAILABLE; its successor on the same address serves the same client.
TEST_F(ServiceTestPlain, ServerRestarts) {
  const TemporaryDirectory directory;
  ServerOptions options = TestOptions();
  options.listen = {"unix:" + directory.Path("socket")};
  const auto own = NewChannel(options.listen[0]);
  const PromptData data(SmallOpen(), 1);
  for (int i = 0; i < 3; ++i) {
    auto first = Server::Start(options);
    ASSERT_TRUE(first.ok()) << first.status();
    EXPECT_TRUE(Eventually([&] { return testkit::Run(own, AllMessages(data)).status.ok(); }));
    Call call(own);
    call.Send(OpenMessage(data.open()));
    ASSERT_TRUE(call.WaitForOpened().has_value());
    (*first)->Shutdown();
    ExpectFailure(call.Finish(), grpc::StatusCode::UNAVAILABLE, {});
    ExpectFailure(testkit::Run(own, AllMessages(data)), grpc::StatusCode::UNAVAILABLE, {});
  }
}

// Both backends agree on every method, within the rounding that two backends may differ by.
TEST_F(ServiceTestPlain, ReferenceBackend) {
  ServerOptions options = TestOptions();
  options.backend = "reference";
  Start(options);
  for (const MethodCase& method : Methods()) {
    SCOPED_TRACE(method.name);
    v1::Open open = SmallOpen(120);
    method.set(&open);
    const PromptData data(open, 17);
    const Outcome outcome = Run(AllMessages(data));
    ExpectSuccess(data, outcome);
    EXPECT_EQ(Assemble(outcome).opened.value_or(v1::Opened()).backend(), "reference");
  }
}

}  // namespace
}  // namespace structkv::testkit
