// /metrics of the real program after traffic that is known to the byte.
#include <csignal>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/admin/http_get.h"
#include "tests/admin/series.h"
#include "tests/e2e/held_test.h"
#include "tests/testing/process.h"
#include "tests/testing/shared_region.h"
#include "tests/trace/fake_collector.h"

namespace structkv::testkit {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

class MetricsProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    server_ = std::make_unique<Process>(std::vector<std::string>{
        STRUCTKV_SERVER, "--listen", "unix:" + directory_.Path("socket"), "--admin-listen",
        "127.0.0.1:0", "--region-socket", directory_.Path("regions"), "--memory-budget", "64MiB",
        "--hold-budget", "16MiB", "--backend", "cpu", "--log-format", "json", "--otlp-endpoint",
        collector_.endpoint()});
    const auto ready = server_->WaitForLine("\"ready\"");
    ASSERT_TRUE(ready.has_value()) << server_->error();
    admin_ = nlohmann::json::parse(*ready)["admin"];
    channel_ = NewChannel("unix:" + directory_.Path("socket"));
  }

  Outcome Run(const std::vector<v1::CompressRequest>& messages) {
    return testkit::Run(channel_, messages);
  }
  v1::Summary RunWell(const std::vector<v1::CompressRequest>& messages) {
    const Outcome outcome = Run(messages);
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    return outcome.responses.back().summary();
  }
  std::map<std::string, double> Series(const std::string& name) {
    return SeriesOf(HttpGet(admin_, "/metrics").body, "structkv_" + name);
  }
  // Of those that are there from the start, the ones that have counted.
  std::map<std::string, double> Counted(const std::string& name) {
    std::map<std::string, double> series = Series(name);
    std::erase_if(series, [](const auto& one) { return one.second == 0; });
    return series;
  }
  // A stream's end is told a moment after its caller knows.
  void WaitForStreams(double prompts) {
    EXPECT_TRUE(Eventually([&] {
      double all = 0;
      for (const auto& [labels, count] : Series("sessions_total")) all += count;
      return all == prompts;
    }));
    EXPECT_TRUE(Eventually([&] { return Series("streams_active")[""] == 0; }));
  }

  TemporaryDirectory directory_;
  FakeCollector collector_;
  std::unique_ptr<Process> server_;
  std::string admin_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(MetricsProcessTest, CountsAreThoseOfTheTraffic) {
  const PromptData data(SmallOpen(200), 1);
  // Three inline ones, the last of them held and fetched.
  const v1::Summary first = RunWell(AllMessages(data));
  const v1::Summary second = RunWell(AllMessages(data));
  std::vector<v1::CompressRequest> hold = AllMessages(data);
  *hold[0].mutable_open() = Held(data.open());
  const v1::Summary held = RunWell(hold);
  const Fetched fetched = Fetch(channel_, FetchRequest(held.held().handle()));
  ASSERT_TRUE(fetched.status.ok()) << fetched.status.error_message();
  // Whether a cache is here is a question, and no fetch.
  for (const auto& [handle, code] :
       {std::pair(held.held().handle(), grpc::StatusCode::OK),
        std::pair(std::string(16, 'x'), grpc::StatusCode::NOT_FOUND)}) {
    v1::FetchCacheRequest question = FetchRequest(handle);
    question.set_info_only(true);
    EXPECT_EQ(Fetch(channel_, question).status.error_code(), code);
  }
  EXPECT_TRUE(Renew(channel_, held.held().handle(), {}, /*lease_millis=*/1).ok());
  // One in shared memory.
  v1::Summary shared;
  {
    RegionConnection connection(directory_.Path("regions"));
    const auto file = SharedFile::Sealed(RangedPrompt::BytesFor(data));
    RangedPrompt ranged(data, file.get(), connection.Register(*file).handle(), /*results=*/true);
    std::vector<v1::CompressRequest> messages = AllMessages(data);
    *messages[0].mutable_open() = ranged.Open(data.open());
    for (size_t i = 1; i + 1 < messages.size(); ++i) messages[i] = ranged.Put(messages[i]);
    shared = RunWell(messages);
    EXPECT_EQ(shared.transport(), "shared_memory");
    EXPECT_EQ(Series("regions")[""], 1);
    EXPECT_EQ(Series("shm_mapped_bytes")[""], static_cast<double>(file->size()));
  }
  // One that wished for CUDA IPC, which the CPU has not.
  v1::Open wishing = data.open();
  wishing.add_transports(v1::TRANSPORT_CUDA_IPC);
  wishing.add_transports(v1::TRANSPORT_INLINE);
  std::vector<v1::CompressRequest> fallen = AllMessages(data);
  *fallen[0].mutable_open() = wishing;
  const v1::Summary fifth = RunWell(fallen);
  // Refused: by what it says, and for want of room.
  v1::Open bad = data.open();
  bad.set_prompt_tokens(0);
  EXPECT_EQ(Run({OpenMessage(bad)}).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Run({OpenMessage(SmallOpen(1'000'000))}).status.error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
  // A NaN in its second layer, which fails.
  PromptData poisoned(SmallOpen(200), 1);
  poisoned.mutable_tensor(1, v1::TENSOR_WINDOW_QUERIES)->replace(0, 4, "\xff\xff\xff\xff");
  const Outcome failed = Run(AllMessages(poisoned));
  EXPECT_EQ(failed.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(failed.status.error_message(), HasSubstr("layer 1"));
  // One that its caller gives up.
  {
    Call call(channel_);
    call.Send(OpenMessage(data.open()));
    ASSERT_TRUE(call.WaitForOpened());
    EXPECT_TRUE(Eventually([&] { return Series("sessions_active")[""] == 1; }));
    EXPECT_GT(Series("memory_reserved_bytes")["pool=\"prompts\""], 0);
    call.Cancel();
    call.Finish();
  }
  WaitForStreams(9);

  EXPECT_THAT(Counted("sessions_total"),
              ElementsAre(Pair("result=\"cancelled\"", 1), Pair("result=\"invalid_argument\"", 2),
                          Pair("result=\"ok\"", 5), Pair("result=\"resource_exhausted\"", 1)));
  EXPECT_THAT(Counted("rejected_total"), ElementsAre(Pair("reason=\"invalid_argument\"", 1),
                                                     Pair("reason=\"memory_budget\"", 1)));
  EXPECT_EQ(Series("nonfinite_values_total")[""], 1);
  const auto layers = Series("layers_total");
  EXPECT_EQ(layers.at("method=\"structkv\",result=\"invalid_argument\""), 1);
  // 5 prompts of 4 layers, and of the one with a NaN what came before it.
  EXPECT_EQ(layers.at("method=\"structkv\",result=\"ok\""), 21);
  const auto count = Series("stage_duration_seconds_count");
  // Until the pivot is known.
  EXPECT_GE(count.at("stage=\"centrality\""), 5);
  for (const char* stage : {"saliency", "select", "gather"}) {
    const double expected = std::string(stage) == "saliency" ? 22 : 21;
    EXPECT_EQ(count.at(std::string("stage=\"") + stage + "\""), expected) << stage;
  }
  EXPECT_EQ(Series("queue_wait_seconds_count")[""], 22);

  const auto input = Series("input_bytes_total");
  const auto output = Series("output_bytes_total");
  const auto poisoned_bytes = input.at("transport=\"inline\"") -
                              static_cast<double>(first.input_bytes() + second.input_bytes() +
                                                  held.input_bytes() + fifth.input_bytes());
  EXPECT_GE(poisoned_bytes, static_cast<double>(data.total_bytes()) / 4 * 2);
  EXPECT_LE(poisoned_bytes, static_cast<double>(data.total_bytes()));
  EXPECT_EQ(input.at("transport=\"shared_memory\""), static_cast<double>(shared.input_bytes()));
  EXPECT_EQ(output.at("transport=\"shared_memory\""), static_cast<double>(shared.output_bytes()));
  EXPECT_GE(output.at("transport=\"inline\""),
            static_cast<double>(first.output_bytes() + second.output_bytes() + held.output_bytes() +
                                fifth.output_bytes() + fetched.bytes.size()));
  EXPECT_THAT(Counted("transport_fallback_total"),
              ElementsAre(Pair("from=\"cuda_ipc\",to=\"inline\"", 1)));
  EXPECT_EQ(Fetch(channel_, FetchRequest(std::string(16, 'x'))).status.error_code(),
            grpc::StatusCode::NOT_FOUND);
  EXPECT_TRUE(Eventually([&] { return Counted("fetches_total").size() == 2; }));
  EXPECT_THAT(Counted("fetches_total"),
              ElementsAre(Pair("result=\"not_found\"", 1), Pair("result=\"ok\"", 1)));
  EXPECT_EQ(Series("compression_ratio_count")[""], 5);
  EXPECT_EQ(Series("pivot_depth_ratio_count")[""], 5);

  // All comes back; the held cache with its lease.
  EXPECT_TRUE(Eventually([&] { return Series("held_caches")[""] == 0; }));
  EXPECT_EQ(Series("leases_expired_total").at("kind=\"held_cache\""), 1);
  EXPECT_TRUE(Eventually([&] { return Series("shm_mapped_bytes")[""] == 0; }));
  EXPECT_EQ(Series("sessions_active")[""], 0);
  EXPECT_THAT(Series("memory_reserved_bytes"),
              ElementsAre(Pair("pool=\"held_caches\"", 0), Pair("pool=\"prompts\"", 0),
                          Pair("pool=\"regions\"", 0)));
  EXPECT_THAT(Series("memory_limit_bytes"), ElementsAre(Pair("pool=\"held_caches\"", 16 << 20),
                                                        Pair("pool=\"prompts\"", 64 << 20),
                                                        Pair("pool=\"regions\"", 64LL << 30)));
  for (const char* nothing :
       {"ipc_handles_open", "nccl_aborts_total", "log_dropped_total", "queue_depth", "draining"}) {
    EXPECT_THAT(Series(nothing), ElementsAre(Pair("", 0))) << nothing;
  }
  EXPECT_EQ(Series("build_info").size(), 1U);
  // A call each, a prompt each, the fetches, and the layers.
  const double spans = 9 + 9 + 4 + 22;
  EXPECT_TRUE(collector_.WaitForSpans(static_cast<size_t>(spans)));
  EXPECT_TRUE(Eventually([&] {
    return Series("trace_spans_total") ==
           std::map<std::string, double>{
               {"result=\"dropped\"", 0}, {"result=\"exported\"", spans}, {"result=\"failed\"", 0}};
  }));
}

// What waits to be exported at the end still goes.
TEST_F(MetricsProcessTest, SpansLeaveBeforeTheProcessDoes) {
  const PromptData data(SmallOpen(200), 1);
  RunWell(AllMessages(data));
  server_->Signal(SIGTERM);
  EXPECT_EQ(server_->Wait(), 0) << server_->error();
  EXPECT_TRUE(collector_.WaitForSpans(6));
  EXPECT_EQ(collector_.spans().size(), 6U);
}

}  // namespace
}  // namespace structkv::testkit
