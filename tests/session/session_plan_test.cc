#include "service/session/session_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels/reference/reference_backend.h"
#include "service/session/layer_assembler.h"
#include "tests/engine/llama_spec.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::session {
namespace {

using ::testing::HasSubstr;

class SessionPlanTest : public ::testing::Test {
 protected:
  SessionPlan Plan(const SessionRequest& request) const {
    const absl::StatusOr<SessionPlan> plan = PlanSession(request, *backend_);
    EXPECT_TRUE(plan.ok()) << plan.status();
    return plan.value_or(SessionPlan());
  }
  void ExpectInvalid(const SessionRequest& request, const std::vector<std::string>& parts) const {
    const absl::Status status = PlanSession(request, *backend_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    for (const std::string& part : parts) {
      EXPECT_THAT(std::string(status.message()), HasSubstr(part));
    }
  }
  const std::unique_ptr<Backend> backend_ = reference::CreateReferenceBackend();
};

TEST_F(SessionPlanTest, EveryLayerInFlightAndEveryMessageByteCounts) {
  SessionRequest request{.spec = engine::LlamaSpec()};
  const int64_t two = Plan(request).reserved_bytes;
  request.layers_in_flight = 3;
  const int64_t three = Plan(request).reserved_bytes;
  // Keys and values of 131,072 tokens, 8 heads of 128 in bf16; queries of 8 rows, 32 heads.
  const int64_t layer = int64_t{2} * 131072 * 8 * 128 * 2 + 32 * 8 * 128 * 2;
  EXPECT_EQ(three - two, layer);
  request.max_message_bytes = 4 << 20;
  EXPECT_EQ(Plan(request).reserved_bytes - three, 4 << 20);
}

// "About two layers plus the compacted results, whatever the number of layers."
TEST_F(SessionPlanTest, ALongPromptTakesAboutTwoLayers) {
  const SessionRequest request{.spec = engine::LlamaSpec()};
  const int64_t layer = int64_t{2} * 131072 * 8 * 128 * 2;
  EXPECT_GE(Plan(request).reserved_bytes, 2 * layer);
  EXPECT_LE(Plan(request).reserved_bytes, 3 * layer);
}

TEST_F(SessionPlanTest, ResultsOfTwoLayersAndThePivotMayWait) {
  for (const testkit::PromptCase& each : testkit::PromptCases()) {
    const engine::PromptSpec spec = testkit::SpecOf(each.open);
    const SessionPlan plan = Plan({.spec = spec, .layers_in_flight = 1});
    const engine::MemoryPlan memory = engine::PlanMemory(spec, *backend_);
    EXPECT_EQ(plan.layer_output_bytes, memory.layer_output_bytes) << each.name;
    int64_t pivot = 0;
    if (spec.method.has_skeleton()) pivot += 4 * spec.skeleton_tokens();
    if (spec.return_centrality) pivot += 4 * spec.prompt_tokens;
    EXPECT_EQ(plan.output_limit_bytes, 2 * memory.layer_output_bytes + pivot) << each.name;
    EXPECT_EQ(plan.reserved_bytes, memory.layer_input_bytes + plan.output_limit_bytes +
                                       memory.state_bytes + memory.scratch_bytes +
                                       LayerAssembler::RecordBytes(spec))
        << each.name;
  }
}

TEST_F(SessionPlanTest, ShortPromptsAreSmall) {
  const auto size_of = [this](const engine::PromptSpec& spec) {
    return Plan({.spec = spec}).layer_size;
  };
  EXPECT_EQ(size_of(testkit::SpecOf(testkit::SmallOpen())), LayerSize::kSmall);
  EXPECT_EQ(size_of(engine::LlamaSpec()), LayerSize::kLarge);
  EXPECT_EQ(size_of(engine::LlamaSpec(method::Method::kStreamingLlm)), LayerSize::kLarge);
  engine::PromptSpec medium = engine::LlamaSpec();
  medium.prompt_tokens = 4096;
  EXPECT_EQ(size_of(medium), LayerSize::kMedium);
}

TEST_F(SessionPlanTest, RefusesWhatIsOutOfRange) {
  SessionRequest request{.spec = engine::LlamaSpec()};
  for (const int64_t layers : {int64_t{0}, int64_t{-1}, int64_t{33}}) {
    request.layers_in_flight = layers;
    ExpectInvalid(request, {"layers_in_flight is " + std::to_string(layers), "32"});
  }
  request.layers_in_flight = 32;
  request.idempotency_key = std::string(128, 'k');
  Plan(request);
  request.idempotency_key += 'k';
  ExpectInvalid(request, {"idempotency_key has 129 bytes", "128"});
  request.idempotency_key.clear();
  request.max_message_bytes = -1;
  ExpectInvalid(request, {"max_message_bytes is -1"});
  request.max_message_bytes = std::numeric_limits<int64_t>::max();
  ExpectInvalid(request, {"more memory than can be counted"});
}

TEST(RecordBytesTest, BoundsThePiecesOfEveryTensor) {
  const engine::PromptSpec spec =
      testkit::SpecOf(testkit::SmallOpen());  // 25,600, 25,600 and 2,048
  const int64_t pieces = 2 * PieceMap::MaxPieces(25600) + PieceMap::MaxPieces(2048);
  const int64_t bytes = LayerAssembler::RecordBytes(spec);
  EXPECT_GE(bytes, 4 * pieces * PieceMap::kBytesPerPiece);
  EXPECT_LE(bytes, 4 * (pieces * PieceMap::kBytesPerPiece + 1024));
}

}  // namespace
}  // namespace structkv::session
