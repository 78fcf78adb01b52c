// A server that holds caches, and what a fetch must bring.
#pragma once

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/held.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {

inline ServerOptions HoldOptions(ServerOptions options = TestOptions()) {
  options.sessions.hold.budget_bytes = int64_t{64} << 20;
  return options;
}

// A small prompt with heads for several tensor-parallel sizes.
inline v1::Open WideOpen(uint32_t tokens = 200) {
  v1::Open open = SmallOpen(tokens);
  open.mutable_geometry()->set_query_head_count(8);
  open.mutable_geometry()->set_kv_head_count(4);
  return open;
}

// Over a fixture with a server.
template <class Base>
class HoldingTest : public Base {
 protected:
  // Runs the prompt of `data` with OUTPUT_HOLD.
  Answer Hold(const PromptData& data, const Metadata& metadata = {}) {
    CallOptions options;
    options.metadata = metadata;
    std::vector<v1::CompressRequest> messages = AllMessages(data);
    *messages[0].mutable_open() = Held(data.open());
    const Outcome outcome = this->Run(messages, options);
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    Answer answer = Assemble(outcome);
    EXPECT_THAT(answer.faults, ::testing::IsEmpty());
    EXPECT_EQ(answer.summary.value_or(v1::Summary()).held().handle().size(), 16U);
    return answer;
  }
  int64_t held_bytes() { return this->server().sessions().held_caches().budget().reserved_bytes(); }
};
using HeldTest = HoldingTest<ServiceTest>;

// Fails the test unless the fetch brought these layers and heads of an inline answer, to the byte.
inline void ExpectSlice(const v1::Open& open, const Answer& whole, const Fetched& fetched,
                        uint32_t first_layer, uint32_t layers, uint32_t first_head,
                        uint32_t heads) {
  SCOPED_TRACE("layers from " + std::to_string(first_layer) + ", heads from " +
               std::to_string(first_head));
  ASSERT_TRUE(fetched.status.ok()) << fetched.status.error_message();
  EXPECT_THAT(fetched.faults, ::testing::IsEmpty());
  ASSERT_TRUE(fetched.info.has_value());
  EXPECT_EQ(fetched.info->first_layer(), first_layer);
  EXPECT_EQ(fetched.info->layer_count(), layers);
  EXPECT_EQ(fetched.info->kv_heads().begin(), first_head);
  EXPECT_EQ(fetched.info->kv_heads().count(), heads);
  ASSERT_EQ(fetched.layers.size(), layers);
  v1::HeadRange range;
  range.set_begin(first_head);
  range.set_count(heads);
  for (uint32_t layer = first_layer; layer < first_layer + layers; ++layer) {
    const LayerAnswer& expected = whole.layers.at(layer);
    const LayerAnswer& got = fetched.layers.at(layer);
    EXPECT_EQ(got.kept_tokens, expected.kept_tokens);
    EXPECT_EQ(got.kept_blocks, expected.kept_blocks);
    EXPECT_TRUE(got.tensors == HeadsOf(open, expected, open.geometry().kv_head_count(), range))
        << "layer " << layer;
  }
}

inline void ExpectFetchFailure(const Fetched& fetched, grpc::StatusCode code,
                               const std::vector<std::string>& texts) {
  EXPECT_EQ(fetched.status.error_code(), code) << fetched.status.error_message();
  for (const std::string& text : texts) {
    EXPECT_THAT(fetched.status.error_message(), ::testing::HasSubstr(text));
  }
}

}  // namespace structkv::testkit
