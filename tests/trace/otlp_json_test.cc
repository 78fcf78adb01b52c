#include "service/trace/otlp_json.h"

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "service/trace/http_url.h"

namespace structkv::trace {
namespace {

using Json = nlohmann::json;

// The encoding's peculiarities: ids are hexadecimal, enums are numbers, 64-bit integers are
// strings.
TEST(OtlpJsonTest, EncodesASpan) {
  Span span;
  span.trace.fill(0xab);
  span.id.fill(0x01);
  span.parent = SpanId{};
  span.parent->fill(0x02);
  span.trace_state = "a=1";
  span.name = "service/Method";
  span.kind = SpanKind::kServer;
  span.begin = absl::FromUnixNanos(1'700'000'000'000'000'001);
  span.end = span.begin + absl::Microseconds(5);
  span.attributes = {{"number", int64_t{9'007'199'254'740'993}}, {"text", "t\xff"}};
  span.error = "INTERNAL: it broke";
  const Json request = Json::parse(EncodeOtlp({{"service.name", "me"}}, {span}));
  ASSERT_EQ(request.size(), 1U);
  ASSERT_EQ(request["resourceSpans"].size(), 1U);
  const Json& resource = request["resourceSpans"][0];
  EXPECT_EQ(resource["resource"]["attributes"],
            Json::parse(R"([{"key": "service.name", "value": {"stringValue": "me"}}])"));
  ASSERT_EQ(resource["scopeSpans"].size(), 1U);
  EXPECT_EQ(resource["scopeSpans"][0]["scope"]["name"], "structkv");
  EXPECT_EQ(resource["scopeSpans"][0]["spans"], Json::parse(R"([{
    "traceId": "abababababababababababababababab",
    "spanId": "0101010101010101",
    "traceState": "a=1",
    "parentSpanId": "0202020202020202",
    "name": "service/Method",
    "kind": 2,
    "startTimeUnixNano": "1700000000000000001",
    "endTimeUnixNano": "1700000000000005001",
    "attributes": [{"key": "number", "value": {"intValue": "9007199254740993"}},
                   {"key": "text", "value": {"stringValue": "t\ufffd"}}],
    "status": {"code": 2, "message": "INTERNAL: it broke"}}])"));
}

TEST(OtlpJsonTest, LeavesOutWhatIsNotThere) {
  Span span;
  span.name = "root";
  const Json request = Json::parse(EncodeOtlp({}, {span}));
  const Json& encoded = request["resourceSpans"][0]["scopeSpans"][0]["spans"][0];
  EXPECT_EQ(encoded["kind"], 1);
  EXPECT_FALSE(encoded.contains("parentSpanId"));
  EXPECT_FALSE(encoded.contains("traceState"));
  EXPECT_FALSE(encoded.contains("status"));
}

TEST(OtlpJsonTest, ReadsWhatWasNotTaken) {
  EXPECT_EQ(RejectedSpans(R"({"partialSuccess": {"rejectedSpans": "3", "errorMessage": "no"}})"),
            3);
  EXPECT_EQ(RejectedSpans(R"({"partialSuccess": {"rejectedSpans": 4}})"), 4);
  for (const char* nothing :
       {"", "{}", "[]", "no JSON", R"({"partialSuccess": null})", R"({"partialSuccess": {}})",
        R"({"partialSuccess": {"rejectedSpans": "many"}})",
        R"({"partialSuccess": {"rejectedSpans": -1}})"}) {
    EXPECT_EQ(RejectedSpans(nothing), 0) << nothing;
  }
}

TEST(HttpUrlTest, TakesUrls) {
  const auto url = ParseHttpUrl("http://collector.monitoring:4318/v1/traces?a=b");
  ASSERT_TRUE(url.ok()) << url.status();
  EXPECT_EQ(url->host, "collector.monitoring");
  EXPECT_EQ(url->port, "4318");
  EXPECT_EQ(url->path, "/v1/traces?a=b");
  EXPECT_EQ(url->authority(), "collector.monitoring:4318");
  EXPECT_EQ(ParseHttpUrl("http://host")->path, "/");
  EXPECT_EQ(ParseHttpUrl("http://host")->port, "80");
  EXPECT_FALSE(url->tls);
  const auto secure = ParseHttpUrl("https://host/v1/traces");
  ASSERT_TRUE(secure.ok()) << secure.status();
  EXPECT_TRUE(secure->tls);
  EXPECT_EQ(secure->authority(), "host:443");
  EXPECT_EQ(ParseHttpUrl("https://host:4318")->port, "4318");
  const auto v6 = ParseHttpUrl("http://[::1]:4318/x");
  ASSERT_TRUE(v6.ok()) << v6.status();
  EXPECT_EQ(v6->host, "::1");
  EXPECT_EQ(v6->authority(), "[::1]:4318");
}

TEST(HttpUrlTest, RefusesAllElse) {
  for (const char* bad :
       {"", "host:4318", "ftp://host:4318/v1/traces", "https:/host", "https://", "http://",
        "http:///path", "http://host:0", "http://host:65536", "http://host:x",
        "http://host:", "http://[::1", "http://[::1]4318", "http://user@host/", "http://ho st/",
        "http://host/a b", "http://host/a#b", "http://host/a\r\nX: y"}) {
    const auto url = ParseHttpUrl(bad);
    EXPECT_FALSE(url.ok()) << bad;
    EXPECT_NE(std::string(url.status().message()).find("http://127.0.0.1:4318/v1/traces"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace structkv::trace
