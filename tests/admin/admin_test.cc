// The admin port of a server that serves.
#include "service/admin/admin.h"

#include <csignal>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "nlohmann/json.hpp"
#include "tests/admin/http_get.h"
#include "tests/session/fault_backend.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"
#include "tests/testing/shards.h"

namespace structkv::testkit {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::json;

class AdminTest : public ServiceTest {
 protected:
  void SetUp() override {
    ServerOptions options = TestOptions();
    options.observer = &telemetry_;
    StartAlone(options, session::MakeFaultBackend(*CreateBackend("auto"), faults_));
    auto admin = admin::Admin::Start({.address = "127.0.0.1:0"}, &server(), &telemetry_, &log_);
    ASSERT_TRUE(admin.ok()) << admin.status();
    admin_ = *std::move(admin);
  }
  // Before what it tells of is gone.
  void TearDown() override {
    admin_.reset();
    if (running()) StopUnderPrompts();
  }

  std::string Get(const std::string& path, int status = 200) {
    const HttpAnswer answer = HttpGet(admin_->address(), path);
    EXPECT_EQ(answer.status, status) << answer.body;
    return answer.body;
  }
  // A prompt's end is told a moment after its caller knows.
  void WaitForPrompts(const std::string& line) {
    EXPECT_TRUE(Eventually([&] {
      return HttpGet(admin_->address(), "/metrics").body.find(line) != std::string::npos;
    })) << line;
  }

  const std::shared_ptr<session::Faults> faults_ = std::make_shared<session::Faults>();
  admin::Telemetry telemetry_;
  rpc::Log log_{rpc::LogFormat::kText};
  std::unique_ptr<admin::Admin> admin_;
};

TEST_F(AdminTest, CountsWhatHappened) {
  const PromptData data(SmallOpen(200), 1);
  const Outcome outcome = Run(AllMessages(data));
  ExpectSuccess(data, outcome);
  v1::Open bad = SmallOpen(200);
  bad.set_prompt_tokens(0);
  EXPECT_FALSE(Run({OpenMessage(bad)}).status.ok());
  WaitForPrompts("structkv_rejected_total{reason=\"invalid_argument\"} 1");
  WaitForPrompts("structkv_sessions_total{result=\"ok\"} 1");
  ExpectNothingHeld();
  const v1::Summary& summary = outcome.responses.back().summary();
  EXPECT_THAT(
      Get("/metrics"),
      AllOf(HasSubstr("structkv_sessions_total{result=\"ok\"} 1\n"),
            HasSubstr("structkv_sessions_total{result=\"invalid_argument\"} 1\n"),
            HasSubstr("structkv_layers_total{method=\"structkv\",result=\"ok\"} 4\n"),
            HasSubstr("structkv_stage_duration_seconds_count{stage=\"gather\"} 4\n"),
            HasSubstr("structkv_layer_compress_duration_seconds_count{method=\"structkv\"} 4\n"),
            HasSubstr("structkv_queue_wait_seconds_count 4\n"),
            HasSubstr("structkv_input_bytes_total{transport=\"inline\"} " +
                      std::to_string(summary.input_bytes()) + "\n"),
            HasSubstr("structkv_output_bytes_total{transport=\"inline\"} " +
                      std::to_string(summary.output_bytes()) + "\n"),
            HasSubstr("structkv_compression_ratio_count 1\n"),
            HasSubstr("structkv_pivot_depth_ratio_count 1\n"),
            HasSubstr("structkv_sessions_active 0\n"),
            HasSubstr("structkv_memory_reserved_bytes{pool=\"prompts\"} 0\n"),
            HasSubstr("structkv_memory_limit_bytes{pool=\"prompts\"} 268435456\n")));
}

TEST_F(AdminTest, ShowsRunningAndRecentPrompts) {
  const PromptData data(SmallOpen(200), 1);
  Call call(channel());
  call.Send(OpenMessage(data.open()));
  call.Send(LayerMessage(data, 0));
  ASSERT_TRUE(call.WaitForLayer(0));
  Json status = Json::parse(Get("/statusz.json"));
  ASSERT_EQ(status["running"].size(), 1U) << status;
  const Json running = status["running"][0];
  EXPECT_EQ(running["method"], "structkv");
  EXPECT_EQ(running["transport"], "inline");
  EXPECT_EQ(running["prompt_tokens"], 200);
  EXPECT_EQ(running["layers"], 4);
  EXPECT_EQ(running["answered"], 1);
  EXPECT_EQ(running["reserved_bytes"], server().sessions().budget().reserved_bytes());
  EXPECT_THAT(Get("/metrics"), HasSubstr("structkv_sessions_active 1\n"));
  for (int64_t layer = 1; layer < 4; ++layer) call.Send(LayerMessage(data, layer));
  call.Send(CommitMessage(data));
  call.HalfClose();
  const Outcome outcome = call.Finish();
  ExpectSuccess(data, outcome);
  WaitForPrompts("structkv_sessions_total{result=\"ok\"} 1");

  status = Json::parse(Get("/statusz.json"));
  EXPECT_EQ(status["running"].size(), 0U);
  ASSERT_EQ(status["prompts"].size(), 1U);
  const Json prompt = status["prompts"][0];
  EXPECT_EQ(prompt["id"], running["id"]);
  EXPECT_EQ(prompt["status"]["code"], "OK");
  const Json picture = prompt["picture"];
  ASSERT_EQ(picture["layers"].size(), 4U);
  // What the page draws is what the caller got.
  const Answer answer = Assemble(outcome);
  ASSERT_TRUE(answer.pivot.has_value());
  EXPECT_EQ(picture["pivot"]["layer"], answer.pivot->decision.pivot_layer());
  EXPECT_EQ(picture["pivot"]["skeleton_tokens"], 40);  // 20 %
  for (const Json& layer : picture["layers"]) {
    EXPECT_EQ(layer["kept"].get<std::string>().size(), 2U * rpc::PromptPicture::kStretches);
    EXPECT_GT(layer["entropy"], 0);
  }
}

// Of a tensor-parallel group the ranks are prompts, and the layers and what is wrong with one of
// them are the group's.
TEST_F(AdminTest, AGroupsLayersCountOnce) {
  v1::Open open = SmallOpen(200);
  open.mutable_geometry()->set_query_head_count(8);
  open.mutable_geometry()->set_kv_head_count(4);
  std::vector<PromptData> parts = SplitByRanks(PromptData(open, 1), 2);
  parts[1].mutable_tensor(1, v1::TENSOR_WINDOW_QUERIES)->replace(0, 4, "\xff\xff\xff\xff");
  std::thread other([&] { testkit::Run(NewChannel(target()), AllMessages(parts[1])); });
  const Outcome outcome = Run(AllMessages(parts[0]));
  other.join();
  EXPECT_FALSE(outcome.status.ok());
  WaitForPrompts("structkv_sessions_total{result=\"invalid_argument\"} 1\n");
  WaitForPrompts("structkv_sessions_total{result=\"aborted\"} 1\n");
  EXPECT_THAT(
      Get("/metrics"),
      AllOf(HasSubstr("structkv_layers_total{method=\"structkv\",result=\"ok\"} 1\n"),
            HasSubstr("structkv_layers_total{method=\"structkv\",result=\"invalid_argument\"} 1\n"),
            HasSubstr("structkv_nonfinite_values_total 1\n")));
}

TEST_F(AdminTest, ShowsErrors) {
  CallOptions options;
  v1::Open bad = SmallOpen(200);
  bad.set_prompt_tokens(0);
  EXPECT_FALSE(Run({OpenMessage(bad)}).status.ok());
  WaitForPrompts("structkv_rejected_total{reason=\"invalid_argument\"} 1");
  const Json status = Json::parse(Get("/statusz.json"));
  ASSERT_EQ(status["errors"].size(), 1U);
  EXPECT_EQ(status["errors"][0]["what"], "a prompt at open");
  EXPECT_EQ(status["errors"][0]["status"]["code"], "INVALID_ARGUMENT");
  EXPECT_THAT(status["errors"][0]["status"]["text"].get<std::string>(), HasSubstr("prompt_tokens"));
}

TEST_F(AdminTest, HealthFollowsTheBackendAndTheDrain) {
  EXPECT_EQ(Get("/livez"), "ok\n");
  EXPECT_EQ(Get("/readyz"), "ok\n");
  faults_->Lose(absl::UnavailableError("GPU 0 failed"));
  EXPECT_EQ(Get("/readyz", 503), "the backend is lost: GPU 0 failed\n");
  EXPECT_EQ(Get("/livez"), "ok\n");
}

TEST_F(AdminTest, DrainingIsNotReady) {
  const PromptData data(SmallOpen(200), 1);
  Call call(channel());
  call.Send(OpenMessage(data.open()));
  call.WaitForOpened();
  std::thread drain([this] { server().Drain(absl::Seconds(30)); });
  EXPECT_TRUE(Eventually([this] { return server().sessions().draining(); }));
  EXPECT_EQ(Get("/readyz", 503), "draining\n");
  EXPECT_THAT(Get("/metrics"), HasSubstr("structkv_draining 1\n"));
  for (int64_t layer = 0; layer < 4; ++layer) call.Send(LayerMessage(data, layer));
  call.Send(CommitMessage(data));
  call.HalfClose();
  ExpectSuccess(data, call.Finish());
  drain.join();
}

TEST_F(AdminTest, ThePageHasAllThatItNeeds) {
  const std::string page = Get("/statusz");
  EXPECT_THAT(page, AllOf(HasSubstr("<title>StructKV</title>"), HasSubstr("/statusz.json"),
                          Not(HasSubstr("src=\"http")), Not(HasSubstr("@import"))));
  EXPECT_THAT(Get("/"), HasSubstr("/statusz\n"));
  EXPECT_THAT(Get("/nowhere", 404), HasSubstr("/metrics\n"));
}

TEST_F(AdminTest, PrometheusTakesTheMetrics) {
  if (std::string(STRUCTKV_PROMTOOL).empty()) {
    GTEST_SKIP() << "promtool is not installed (Debian: prometheus)";
  }
  const PromptData data(SmallOpen(200), 1);
  ExpectSuccess(data, Run(AllMessages(data)));
  WaitForPrompts("structkv_sessions_total{result=\"ok\"} 1");
  TemporaryDirectory directory;
  const std::string file = directory.Path("metrics");
  std::ofstream(file) << Get("/metrics");
  Process promtool({"/bin/sh", "-c", std::string(STRUCTKV_PROMTOOL) + " check metrics < " + file});
  EXPECT_EQ(promtool.Wait(), 0) << promtool.output() << promtool.error();
  EXPECT_EQ(promtool.output() + promtool.error(), "");  // nor does it complain
}

// The program itself: its admin port is loopback's, and one that is taken stops the start.
TEST(AdminProcessTest, TheServerServesIt) {
  TemporaryDirectory directory;
  Process server({STRUCTKV_SERVER, "--listen", "unix:" + directory.Path("a"), "--admin-listen",
                  "127.0.0.1:0"});
  const std::optional<std::string> ready = server.WaitForLine("ready");
  ASSERT_TRUE(ready.has_value()) << server.error();
  const size_t at = ready->find(" admin=") + 7;
  const std::string address = ready->substr(at, ready->find(' ', at) - at);
  EXPECT_EQ(HttpGet(address, "/readyz").body, "ok\n");
  Process other(
      {STRUCTKV_SERVER, "--listen", "unix:" + directory.Path("b"), "--admin-listen", address});
  EXPECT_EQ(other.Wait(), 1);
  EXPECT_THAT(other.error(), HasSubstr("structkv-server: admin-listen: cannot listen on " +
                                       address + ": Address already in use"));
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
}

}  // namespace
}  // namespace structkv::testkit
