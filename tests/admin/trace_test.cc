// What a caller says of a call by its metadata: its own name, in the log and on the status page,
// and its trace, which goes to a collector.
#include <unistd.h>

#include <cstdio>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "service/admin/admin.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/admin/http_get.h"
#include "tests/e2e/client_prompt.h"
#include "tests/e2e/held_test.h"
#include "tests/testing/process.h"
#include "tests/trace/fake_collector.h"

namespace structkv::testkit {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using Json = nlohmann::json;

constexpr char kTrace[] = "4bf92f3577b34da6a3ce929d0e0e4736";
constexpr char kSpan[] = "00f067aa0ba902b7";

std::string Traceparent(const std::string& flags) {
  return absl::StrCat("00-", kTrace, "-", kSpan, "-", flags);
}

class TraceTest : public HeldTest {
 protected:
  ~TraceTest() override { std::fclose(log_file_); }

  // `ratio`: of the calls without a traceparent; none: there is no exporter.
  void StartTracing(std::optional<double> ratio = 1) {
    ServerOptions options = HoldOptions();
    if (ratio.has_value()) {
      auto exporter = trace::OtlpExporter::Start(
          {.endpoint = collector_.endpoint(), .interval = absl::Milliseconds(5)});
      ASSERT_TRUE(exporter.ok()) << exporter.status();
      exporter_ = *std::move(exporter);
    }
    telemetry_ = std::make_unique<admin::Telemetry>(exporter_.get());
    options.trace_ratio = ratio;
    options.observer = telemetry_.get();
    options.log = std::make_shared<rpc::Log>(rpc::LogFormat::kJson, fileno(log_file_));
    StartAlone(options);
    auto admin = admin::Admin::Start({.address = "127.0.0.1:0"}, &server(), telemetry_.get(),
                                     options.log.get());
    ASSERT_TRUE(admin.ok()) << admin.status();
    admin_ = *std::move(admin);
  }
  void TearDown() override {
    admin_.reset();
    if (running()) Stop();
  }

  Outcome RunWith(const Metadata& metadata) { return RunWith(data_, metadata); }
  Outcome RunWith(const PromptData& data, const Metadata& metadata) {
    CallOptions options;
    options.metadata = metadata;
    return Run(AllMessages(data), options);
  }
  // The log's lines of an event, once there are so many.
  std::vector<Json> WaitForLines(const std::string& event, size_t count) {
    std::vector<Json> lines;
    EXPECT_TRUE(Eventually([&] {
      lines.clear();
      for (const auto line : absl::StrSplit(ReadLog(), '\n', absl::SkipEmpty())) {
        Json json = Json::parse(std::string(line));
        if (json["event"] == event) lines.push_back(std::move(json));
      }
      return lines.size() >= count;
    })) << ReadLog();
    return lines;
  }
  std::string ReadLog() {
    std::string text(1 << 16, '\0');
    const ssize_t size = pread(fileno(log_file_), text.data(), text.size(), 0);
    text.resize(size < 0 ? 0 : static_cast<size_t>(size));
    return text;
  }
  std::string Metrics() { return HttpGet(admin_->address(), "/metrics").body; }
  // Those of a name, of all that has come.
  std::vector<Json> SpansOf(const std::string& name) {
    std::vector<Json> found;
    for (const Json& span : collector_.spans()) {
      if (span["name"] == name) found.push_back(span);
    }
    return found;
  }

  const PromptData data_{SmallOpen(200), 1};
  std::FILE* const log_file_ = std::tmpfile();
  FakeCollector collector_;
  std::unique_ptr<trace::OtlpExporter> exporter_;
  std::unique_ptr<admin::Telemetry> telemetry_;
  std::unique_ptr<admin::Admin> admin_;
};

TEST_F(TraceTest, APromptIsASpanWithItsLayersBelow) {
  StartTracing();
  ExpectSuccess(data_, RunWith({{"traceparent", Traceparent("01")},
                                {"tracestate", "vendor=1"},
                                {"structkv-session-id", "request-7/a"}}));
  ASSERT_TRUE(collector_.WaitForSpans(6));  // the call, the prompt, 4 layers
  const auto calls = SpansOf("structkv.v1.Compression/Compress");
  const auto prompts = SpansOf("prompt");
  const auto layers = SpansOf("layer");
  ASSERT_EQ(calls.size(), 1U);
  ASSERT_EQ(prompts.size(), 1U);
  ASSERT_EQ(layers.size(), 4U);
  EXPECT_EQ(calls[0]["parentSpanId"], kSpan);
  EXPECT_EQ(calls[0]["kind"], 2);
  EXPECT_EQ(AttributeOf(calls[0], "rpc.grpc.status_code"), "0");
  EXPECT_EQ(AttributeOf(calls[0], "structkv.client_session"), "request-7/a");
  EXPECT_EQ(AttributeOf(calls[0], "structkv.prompts"), "1");
  EXPECT_EQ(prompts[0]["parentSpanId"], calls[0]["spanId"]);
  EXPECT_EQ(AttributeOf(prompts[0], "structkv.method"), "structkv");
  EXPECT_EQ(AttributeOf(prompts[0], "structkv.transport"), "inline");
  EXPECT_EQ(AttributeOf(prompts[0], "structkv.prompt_tokens"), "200");
  EXPECT_EQ(AttributeOf(prompts[0], "structkv.layers_answered"), "4");
  std::set<std::string> ids;
  std::set<std::string> numbers;
  for (const Json& span : collector_.spans()) {
    EXPECT_EQ(span["traceId"], kTrace);
    EXPECT_EQ(span["traceState"], "vendor=1");
    EXPECT_TRUE(ids.insert(span["spanId"].get<std::string>()).second);
    EXPECT_FALSE(span.contains("status"));
    EXPECT_LE(span["startTimeUnixNano"].get<std::string>(),
              span["endTimeUnixNano"].get<std::string>());
    // Within the call: decimals of equal length compare as their numbers do.
    EXPECT_GE(span["startTimeUnixNano"].get<std::string>(),
              calls[0]["startTimeUnixNano"].get<std::string>());
    EXPECT_LE(span["endTimeUnixNano"].get<std::string>(),
              calls[0]["endTimeUnixNano"].get<std::string>());
  }
  for (const Json& layer : layers) {
    EXPECT_EQ(layer["parentSpanId"], prompts[0]["spanId"]);
    numbers.insert(AttributeOf(layer, "structkv.layer"));
    EXPECT_NE(AttributeOf(layer, "structkv.queued_micros"), "");
    const bool whole = !AttributeOf(layer, "structkv.layer_pass_micros").empty();
    for (const char* stage : {"saliency", "select", "gather"}) {
      EXPECT_EQ(AttributeOf(layer, absl::StrCat("structkv.", stage, "_micros")).empty(),
                whole && std::string(stage) != "gather")
          << layer;
    }
  }
  EXPECT_EQ(numbers, (std::set<std::string>{"0", "1", "2", "3"}));
  EXPECT_TRUE(Eventually([this] {
    return Metrics().find("structkv_trace_spans_total{result=\"exported\"} 6\n") !=
           std::string::npos;
  })) << Metrics();
}

// Whether a trace is recorded is said by who began it.
TEST_F(TraceTest, TheSampledFlagIsHonoured) {
  StartTracing(/*ratio=*/1);
  ExpectSuccess(data_, RunWith({{"traceparent", Traceparent("00")}}));
  ExpectSuccess(data_, RunWith({{"traceparent", Traceparent("01")}}));
  ASSERT_TRUE(collector_.WaitForSpans(6));
  EXPECT_EQ(collector_.spans().size(), 6U);
  EXPECT_EQ(SpansOf("prompt").size(), 1U);
  // The log names the trace of both.
  for (const Json& line : WaitForLines("session", 2)) EXPECT_EQ(line["trace"], kTrace);
}

TEST_F(TraceTest, AnInvalidTraceparentBeginsANewTrace) {
  StartTracing();
  const std::vector<Metadata> bad = {
      {},
      {{"traceparent", ""}},
      {{"traceparent", Traceparent("0x")}, {"tracestate", "vendor=1"}},
      {{"traceparent", Traceparent("01")}, {"traceparent", Traceparent("01")}},
      {{"traceparent", absl::StrCat("00-", std::string(32, '0'), "-", kSpan, "-01")}},
      {{"tracestate", "vendor=1"}},
  };
  for (const Metadata& metadata : bad) ExpectSuccess(data_, RunWith(metadata));
  ASSERT_TRUE(collector_.WaitForSpans(6 * bad.size()));
  std::set<std::string> traces;
  for (const Json& call : SpansOf("structkv.v1.Compression/Compress")) {
    EXPECT_FALSE(call.contains("parentSpanId"));
    EXPECT_FALSE(call.contains("traceState"));
    EXPECT_NE(call["traceId"], kTrace);
    traces.insert(call["traceId"].get<std::string>());
  }
  EXPECT_EQ(traces.size(), bad.size());
  for (const Json& line : WaitForLines("session", bad.size())) {
    EXPECT_EQ(traces.count(line["trace"].get<std::string>()), 1U);
  }
}

TEST_F(TraceTest, AnInvalidTracestateIsLeftOut) {
  StartTracing();
  ExpectSuccess(data_,
                RunWith({{"traceparent", Traceparent("01")}, {"tracestate", "vendor=1,=2"}}));
  ASSERT_TRUE(collector_.WaitForSpans(6));
  for (const Json& span : collector_.spans()) {
    EXPECT_EQ(span["traceId"], kTrace);
    EXPECT_FALSE(span.contains("traceState"));
  }
}

TEST_F(TraceTest, ALongTracestateIsLeftOut) {
  StartTracing();
  const std::string first = absl::StrCat("a=", std::string(254, 'x'));
  const std::string most = absl::StrCat(first, ",b=", std::string(253, 'y'));
  ASSERT_EQ(most.size(), 512U);
  ExpectSuccess(data_, RunWith({{"traceparent", Traceparent("01")}, {"tracestate", most}}));
  ASSERT_TRUE(collector_.WaitForSpans(6));
  for (const Json& span : collector_.spans()) EXPECT_EQ(span["traceState"], most);
  ExpectSuccess(data_, RunWith({{"traceparent", Traceparent("01")},
                                {"tracestate", most.substr(0, 256)},
                                {"tracestate", most.substr(257) + "y"}}));
  ASSERT_TRUE(collector_.WaitForSpans(12));
  const auto without = collector_.spans();
  for (size_t i = 6; i < 12; ++i) EXPECT_FALSE(without[i].contains("traceState"));
}

TEST_F(TraceTest, ARatioOfNothingStillFollowsSampledCallers) {
  StartTracing(/*ratio=*/0);
  ExpectSuccess(data_, RunWith({}));
  ExpectSuccess(data_, RunWith({{"traceparent", Traceparent("01")}}));
  ASSERT_TRUE(collector_.WaitForSpans(6));
  for (const Json& span : collector_.spans()) EXPECT_EQ(span["traceId"], kTrace);
}

TEST_F(TraceTest, FailuresAreTold) {
  StartTracing();
  PromptData bad(SmallOpen(200), 1);
  bad.mutable_tensor(1, v1::TENSOR_WINDOW_QUERIES)->replace(0, 4, "\xff\xff\xff\xff");
  EXPECT_EQ(RunWith(bad, {}).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  ASSERT_TRUE(collector_.WaitForSpans(4));  // layers 0 and 1
  const auto calls = SpansOf("structkv.v1.Compression/Compress");
  ASSERT_EQ(calls.size(), 1U);
  EXPECT_EQ(AttributeOf(calls[0], "rpc.grpc.status_code"), "3");
  EXPECT_FALSE(calls[0].contains("status"));  // the caller's fault, not the server's
  ASSERT_EQ(SpansOf("prompt").size(), 1U);
  EXPECT_THAT(SpansOf("prompt")[0]["status"]["message"].get<std::string>(),
              AllOf(HasSubstr("INVALID_ARGUMENT"), HasSubstr("layer 1")));
  ASSERT_EQ(SpansOf("layer").size(), 2U);
  EXPECT_FALSE(SpansOf("layer")[0].contains("status"));
  EXPECT_EQ(SpansOf("layer")[1]["status"]["code"], 2);
}

TEST_F(TraceTest, AFetchIsASpan) {
  StartTracing();
  const Answer held = Hold(data_);
  ASSERT_TRUE(collector_.WaitForSpans(6));
  const Fetched fetched =
      Fetch(channel(), FetchRequest(held.summary->held().handle()),
            {{"traceparent", Traceparent("01")}, {"structkv-session-id", "decode-1"}});
  ASSERT_TRUE(fetched.status.ok()) << fetched.status.error_message();
  ASSERT_TRUE(collector_.WaitForSpans(7));
  const auto spans = SpansOf("structkv.v1.HeldCaches/FetchCache");
  ASSERT_EQ(spans.size(), 1U);
  EXPECT_EQ(spans[0]["traceId"], kTrace);
  EXPECT_EQ(spans[0]["parentSpanId"], kSpan);
  EXPECT_EQ(AttributeOf(spans[0], "structkv.layers"), "4");
  EXPECT_EQ(AttributeOf(spans[0], "structkv.client_session"), "decode-1");
  const std::vector<Json> lines = WaitForLines("fetch", 1);
  EXPECT_EQ(lines[0]["client_session"], "decode-1");
  EXPECT_EQ(lines[0]["trace"], kTrace);
  EXPECT_TRUE(Release(channel(), held.summary->held().handle()).ok());
}

// Prompts go on as ever while nobody takes spans.
TEST_F(TraceTest, ACollectorThatIsGoneHoldsUpNothing) {
  collector_.Close();
  StartTracing();
  for (int i = 0; i < 3; ++i) ExpectSuccess(data_, RunWith({}));
  ExpectNothingHeld();
}

TEST_F(TraceTest, WithoutACollectorTheLogStillNamesTheTrace) {
  StartTracing(/*ratio=*/std::nullopt);
  ExpectSuccess(data_, RunWith({{"traceparent", Traceparent("01")}}));
  ExpectSuccess(data_, RunWith({}));
  const std::vector<Json> lines = WaitForLines("session", 2);
  EXPECT_EQ(lines[0]["trace"], kTrace);
  EXPECT_EQ(lines[0]["client_session"], "-");
  EXPECT_EQ(lines[1]["trace"], "-");
  EXPECT_THAT(Metrics(), ::testing::Not(HasSubstr("structkv_trace_spans_total")));
}

TEST_F(TraceTest, SessionIdsAreInTheLogAndOnTheStatusPage) {
  StartTracing(/*ratio=*/std::nullopt);
  const std::string id = "Az09._:/+@-" + std::string(117, 'x');
  CallOptions options;
  options.metadata = {{"structkv-session-id", id}};
  Call call(channel(), options);
  call.Send(OpenMessage(data_.open()));
  call.Send(LayerMessage(data_, 0));
  ASSERT_TRUE(call.WaitForLayer(0));
  Json status = Json::parse(HttpGet(admin_->address(), "/statusz.json").body);
  ASSERT_EQ(status["running"].size(), 1U);
  EXPECT_EQ(status["running"][0]["client_session"], id);
  call.Cancel();
  call.Finish();
  const std::vector<Json> lines = WaitForLines("session", 1);
  EXPECT_EQ(lines[0]["client_session"], id);
  EXPECT_EQ(lines[0]["status"], "CANCELLED");
  status = Json::parse(HttpGet(admin_->address(), "/statusz.json").body);
  ASSERT_EQ(status["errors"].size(), 1U);
  EXPECT_EQ(status["errors"][0]["what"],
            absl::StrCat("prompt ", lines[0]["id"].get<std::string>(), " (", id, ")"));
}

TEST_F(TraceTest, OtherSessionIdsAreRefused) {
  StartTracing(/*ratio=*/std::nullopt);
  const auto refused = [this](const Metadata& metadata, const std::string& text) {
    ExpectFailure(RunWith(metadata), grpc::StatusCode::INVALID_ARGUMENT,
                  {"metadata structkv-session-id", text});
    const Fetched fetched = Fetch(channel(), FetchRequest(std::string(16, 'h')), metadata);
    ExpectFetchFailure(fetched, grpc::StatusCode::INVALID_ARGUMENT, {text});
  };
  const std::string key = "structkv-session-id";
  refused({{key, ""}}, "is 0 bytes long; 1 to 128 are allowed");
  refused({{key, std::string(129, 'x')}}, "is 129 bytes long; 1 to 128 are allowed");
  refused({{key, "two words"}}, "has ' ' at byte 3; letters, digits and ._:/+@- are allowed");
  refused({{key, "a\"b"}}, "at byte 1");
  refused({{key, "a"}, {key, "b"}}, "comes 2 times; once is allowed");
}

// By the client library's options.
TEST_F(TraceTest, TheClientPassesThemOn) {
  StartTracing();
  const auto client = *client::Client::Connect(target());
  client::SessionOptions options;
  options.labels = {
      .session_id = "mine", .traceparent = Traceparent("01"), .tracestate = "vendor=1"};
  v1::Open open = data_.open();
  open.set_output(v1::OUTPUT_HOLD);
  const auto compressed = client::CompressPrompt(
      *client, open,
      [&](uint32_t layer) { return absl::StatusOr<client::LayerTensors>(TensorsOf(data_, layer)); },
      options);
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  client::FetchOptions fetch;
  fetch.labels = options.labels;
  const std::string handle = compressed->summary.held().handle();
  ASSERT_TRUE(client->FetchCache(handle, fetch).ok());
  ASSERT_TRUE(collector_.WaitForSpans(7));
  for (const Json& span : collector_.spans()) {
    EXPECT_EQ(span["traceId"], kTrace);
    EXPECT_EQ(span["traceState"], "vendor=1");
  }
  EXPECT_EQ(WaitForLines("session", 1)[0]["client_session"], "mine");
  EXPECT_EQ(WaitForLines("fetch", 1)[0]["client_session"], "mine");
  EXPECT_TRUE(client->ReleaseCache(handle).ok());
}

// Each prompt of a batch is a span below that of the call.
TEST_F(TraceTest, ABatchHasASpanForEachPrompt) {
  StartTracing();
  const auto client = *client::Client::Connect(target());
  const std::vector<client::BatchPrompt> prompts(2, {data_.open(), {}});
  client::StreamOptions options;
  options.labels.traceparent = Traceparent("01");
  auto sessions = client->OpenBatch(prompts, options);
  for (auto& session : sessions) {
    ASSERT_TRUE(session.ok()) << session.status();
    for (uint32_t layer = 0; layer < data_.layers(); ++layer) {
      ASSERT_TRUE((*session)->SendLayer(layer, TensorsOf(data_, layer)).ok());
    }
    ASSERT_TRUE((*session)->Commit().ok());
    ASSERT_TRUE((*session)->Collect().ok());
  }
  ASSERT_TRUE(collector_.WaitForSpans(11));  // the call, 2 prompts, 8 layers
  const auto calls = SpansOf("structkv.v1.Compression/Compress");
  ASSERT_EQ(calls.size(), 1U);
  EXPECT_EQ(AttributeOf(calls[0], "structkv.prompts"), "2");
  const auto found = SpansOf("prompt");
  ASSERT_EQ(found.size(), 2U);
  for (const Json& prompt : found) EXPECT_EQ(prompt["parentSpanId"], calls[0]["spanId"]);
  EXPECT_EQ(SpansOf("layer").size(), 8U);
}

}  // namespace
}  // namespace structkv::testkit
