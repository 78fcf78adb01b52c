#include "service/rpc/capabilities.h"

#include <string>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "service/rpc/open_decoder.h"
#include "tests/rpc/open_messages.h"

namespace structkv::rpc {
namespace {

using ::testing::ElementsAre;

class CapabilitiesTest : public ::testing::Test {
 protected:
  static std::unique_ptr<Backend> Reference() {
    absl::StatusOr<std::unique_ptr<Backend>> backend = CreateBackend("reference");
    EXPECT_TRUE(backend.ok()) << backend.status();
    return *std::move(backend);
  }

  session::SessionManager sessions_{
      {.limits = {.max_prompt_tokens = 5000, .max_layers = 40, .max_heads = 48, .max_window = 16},
       .memory_budget_bytes = 64 << 20,
       .max_sessions = 7,
       .threads = 2},
      Reference()};
};

TEST_F(CapabilitiesTest, TheBackendInUseComesFirst) {
  const v1::GetCapabilitiesResponse response = MakeCapabilities(sessions_, 1 << 20);
  ASSERT_EQ(response.backends_size(), static_cast<int>(BackendNames().size()));
  EXPECT_EQ(response.backends(0).name(), "reference");
  EXPECT_THAT(response.backends(0).devices(),
              ElementsAre(sessions_.backend().device(), "2 threads"));
  for (int i = 1; i < response.backends_size(); ++i) {
    EXPECT_NE(response.backends(i).name(), "reference");
  }
  EXPECT_NE(response.version(), "");
}

TEST_F(CapabilitiesTest, ListsWhatTheApiHas) {
  const v1::GetCapabilitiesResponse response = MakeCapabilities(sessions_, 1 << 20);
  EXPECT_THAT(response.dtypes(), ElementsAre(v1::DTYPE_F32, v1::DTYPE_F16, v1::DTYPE_BF16,
                                             v1::DTYPE_F8_E4M3, v1::DTYPE_F8_E5M2));
  EXPECT_THAT(response.layouts(),
              ElementsAre(v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM));
  EXPECT_THAT(response.methods(), ElementsAre("structkv", "snapkv", "streaming_llm", "full",
                                              "pyramidkv", "fastkv", "gemfilter", "h2o"));
  EXPECT_THAT(response.statistics(),
              ElementsAre(v1::STATISTIC_NONE, v1::STATISTIC_WINDOW_QUERIES, v1::STATISTIC_SALIENCY,
                          v1::STATISTIC_SALIENCY_PER_KV_HEAD));
  EXPECT_THAT(response.pivot_modes(), ElementsAre(v1::PIVOT_MODE_EXACT, v1::PIVOT_MODE_FIXED,
                                                  v1::PIVOT_MODE_ONLINE, v1::PIVOT_MODE_PROFILED));
  EXPECT_THAT(response.transports(), ElementsAre("inline"));
  EXPECT_EQ(response.key_dims().min(), 32);
  EXPECT_EQ(response.key_dims().max(), 256);
  EXPECT_EQ(response.key_dims().step(), 8);
  EXPECT_THAT(response.key_dims().extra(), ElementsAre(512, 576));
}

TEST_F(CapabilitiesTest, LimitsAreTheServersOwn) {
  const v1::Limits limits = MakeCapabilities(sessions_, 1 << 20).limits();
  EXPECT_EQ(limits.max_prompt_tokens(), 5000);
  EXPECT_EQ(limits.max_layers(), 40);
  EXPECT_EQ(limits.max_heads(), 48);
  EXPECT_EQ(limits.max_window_tokens(), 16);
  EXPECT_EQ(limits.max_message_bytes(), 1 << 20);
  EXPECT_EQ(limits.max_sessions(), 7);
  EXPECT_EQ(limits.memory_budget_bytes(), 64 << 20);
  EXPECT_EQ(limits.memory_available_bytes(), 64 << 20);
}

TEST_F(CapabilitiesTest, AvailableMemoryFollowsTheSessions) {
  absl::StatusOr<OpenRequest> open = DecodeOpen(ValidOpen(), 1 << 20);
  ASSERT_TRUE(open.ok()) << open.status();
  absl::StatusOr<std::shared_ptr<session::Session>> session = sessions_.Open(
      {.spec = open->spec, .layers_in_flight = open->layers_in_flight, .max_message_bytes = 1000});
  ASSERT_TRUE(session.ok()) << session.status();
  const auto reserved = static_cast<uint64_t>((*session)->reserved_bytes());
  EXPECT_GT(reserved, 0);
  EXPECT_EQ(MakeCapabilities(sessions_, 1 << 20).limits().memory_available_bytes(),
            (64 << 20) - reserved);
  session->reset();
  EXPECT_EQ(MakeCapabilities(sessions_, 1 << 20).limits().memory_available_bytes(), 64 << 20);
}

TEST_F(CapabilitiesTest, LoadFollowsTheSessions) {
  EXPECT_EQ(MakeLoad(sessions_).reserved_bytes(), 0);
  EXPECT_EQ(MakeLoad(sessions_).limit_bytes(), 64 << 20);
  EXPECT_EQ(MakeLoad(sessions_).max_sessions(), 7);
  session::SessionLimits limits = sessions_.limits();
  limits.max_sessions = 3;
  sessions_.SetLimits(limits);  // as a reload does
  EXPECT_EQ(MakeLoad(sessions_).max_sessions(), 3);
  absl::StatusOr<OpenRequest> open = DecodeOpen(ValidOpen(), 1 << 20);
  ASSERT_TRUE(open.ok()) << open.status();
  absl::StatusOr<std::shared_ptr<session::Session>> session = sessions_.Open(
      {.spec = open->spec, .layers_in_flight = open->layers_in_flight, .max_message_bytes = 1000});
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ(MakeLoad(sessions_).reserved_bytes(),
            static_cast<uint64_t>((*session)->reserved_bytes()));
  EXPECT_EQ(MakeLoad(sessions_).active_sessions(), 1);
  EXPECT_FALSE(MakeLoad(sessions_).draining());
  sessions_.StartDraining();
  EXPECT_TRUE(MakeLoad(sessions_).draining());
  session->reset();
  EXPECT_EQ(MakeLoad(sessions_).reserved_bytes(), 0);
  EXPECT_EQ(MakeLoad(sessions_).active_sessions(), 0);
}

}  // namespace
}  // namespace structkv::rpc
