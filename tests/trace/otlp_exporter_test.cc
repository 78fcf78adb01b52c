// The exporter against a real receiver, which is sometimes slow, unwilling or gone.
#include "service/trace/otlp_exporter.h"

#include <atomic>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/certificates.h"
#include "tests/testing/process.h"
#include "tests/trace/fake_collector.h"

namespace structkv::trace {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testkit::FakeCollector;

bool Eventually(const std::function<bool()>& holds) {
  const absl::Time end = absl::Now() + absl::Seconds(60);
  while (!holds()) {
    if (absl::Now() > end) return false;
    absl::SleepFor(absl::Milliseconds(2));
  }
  return true;
}

std::vector<Span> Spans(int count) {
  std::vector<Span> spans;
  for (int i = 0; i < count; ++i) {
    Span span;
    span.trace = NewTraceId();
    span.id = NewSpanId();
    span.name = "span " + std::to_string(i);
    span.begin = span.end = absl::Now();
    spans.push_back(std::move(span));
  }
  return spans;
}

class OtlpExporterTest : public ::testing::Test {
 protected:
  OtlpOptions Options() {
    OtlpOptions options = {.endpoint = collector_.endpoint(),
                           .resource = {{"service.name", "test"}},
                           .interval = absl::Milliseconds(10),
                           .first_backoff = absl::Milliseconds(5),
                           .max_backoff = absl::Milliseconds(20)};
    options.warn = [this](const std::string& text) {
      const std::lock_guard lock(mutex_);
      warnings_.push_back(text);
    };
    return options;
  }
  void Start(OtlpOptions options) {
    auto exporter = OtlpExporter::Start(std::move(options));
    ASSERT_TRUE(exporter.ok()) << exporter.status();
    exporter_ = *std::move(exporter);
  }
  std::vector<std::string> warnings() {
    const std::lock_guard lock(mutex_);
    return warnings_;
  }
  bool WaitFor(int64_t exported, int64_t dropped, int64_t failed) {
    return Eventually([&] {
      const ExportCounts counts = exporter_->counts();
      return counts.exported == exported && counts.dropped == dropped && counts.failed == failed;
    });
  }

  FakeCollector collector_;
  std::mutex mutex_;
  std::vector<std::string> warnings_;
  std::unique_ptr<OtlpExporter> exporter_;
};

TEST_F(OtlpExporterTest, SendsWhatItIsGiven) {
  Start(Options());
  exporter_->Add(Spans(3));
  ASSERT_TRUE(WaitFor(3, 0, 0));
  const auto requests = collector_.requests();
  ASSERT_EQ(requests.size(), 1U);
  EXPECT_EQ(requests[0].target, "/v1/traces");
  EXPECT_EQ(requests[0].content_type, "application/json");
  ASSERT_EQ(collector_.spans().size(), 3U);
  EXPECT_EQ(collector_.spans()[2]["name"], "span 2");
  EXPECT_TRUE(warnings().empty());
}

TEST_F(OtlpExporterTest, BatchesAreBounded) {
  OtlpOptions options = Options();
  options.max_batch = 10;
  Start(std::move(options));
  exporter_->Add(Spans(25));
  ASSERT_TRUE(WaitFor(25, 0, 0));
  const auto requests = collector_.requests();
  ASSERT_EQ(requests.size(), 3U);
  EXPECT_EQ(collector_.spans()[24]["name"], "span 24");
}

TEST_F(OtlpExporterTest, TriesAgainWhileTheCollectorIsOverloaded) {
  collector_.AnswerWith({503, 429, 502, 504});
  Start(Options());
  exporter_->Add(Spans(2));
  ASSERT_TRUE(WaitFor(2, 0, 0));
  EXPECT_EQ(collector_.requests().size(), 5U);
  EXPECT_EQ(collector_.requests()[0].body, collector_.requests()[4].body);
  EXPECT_TRUE(warnings().empty());
}

TEST_F(OtlpExporterTest, GivesUpInTheEnd) {
  collector_.AnswerWith(std::vector<int>(5, 503));
  Start(Options());
  exporter_->Add(Spans(2));
  ASSERT_TRUE(WaitFor(0, 0, 2));
  EXPECT_EQ(collector_.requests().size(), 5U);
  ASSERT_TRUE(Eventually([this] { return !warnings().empty(); }));
  EXPECT_THAT(warnings(),
              ElementsAre(HasSubstr("the collector answered with 503; spans are lost")));
  exporter_->Add(Spans(1));  // goes on with the next ones
  EXPECT_TRUE(WaitFor(1, 0, 2));
}

TEST_F(OtlpExporterTest, DoesNotInsistWhereTheCollectorRefuses) {
  collector_.AnswerWith({400});
  Start(Options());
  exporter_->Add(Spans(2));
  ASSERT_TRUE(WaitFor(0, 0, 2));
  EXPECT_EQ(collector_.requests().size(), 1U);
}

TEST_F(OtlpExporterTest, CountsWhatTheCollectorDidNotTake) {
  collector_.SetReply(R"({"partialSuccess": {"rejectedSpans": "2", "errorMessage": "old"}})");
  Start(Options());
  exporter_->Add(Spans(5));
  EXPECT_TRUE(WaitFor(3, 0, 2));
}

TEST_F(OtlpExporterTest, WaitsAsLongAsItIsTold) {
  collector_.AnswerWith({503});
  collector_.SetReply("{}", "3600");
  OtlpOptions options = Options();
  options.max_backoff = absl::Hours(1);
  options.flush_limit = absl::Seconds(60);
  Start(std::move(options));
  exporter_->Add(Spans(1));
  ASSERT_TRUE(Eventually([this] { return collector_.requests().size() == 1; }));
  // Longer than its own waits, and the end does not wait for it.
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_EQ(collector_.requests().size(), 1U);
  exporter_.reset();
  EXPECT_THAT(warnings(), ElementsAre(HasSubstr("503")));
}

TEST_F(OtlpExporterTest, ACollectorThatIsDown) {
  collector_.Close();
  OtlpOptions options = Options();
  options.attempts = 2;
  Start(std::move(options));
  exporter_->Add(Spans(2));
  ASSERT_TRUE(WaitFor(0, 0, 2));
  ASSERT_TRUE(Eventually([this] { return !warnings().empty(); }));
  exporter_->Add(Spans(2));
  ASSERT_TRUE(WaitFor(0, 0, 4));
  // Once, until spans go again.
  EXPECT_THAT(warnings(), ElementsAre(HasSubstr("connecting: Connection refused")));
}

TEST_F(OtlpExporterTest, ACollectorThatDoesNotAnswer) {
  collector_.AnswerWith({0, 0});
  OtlpOptions options = Options();
  options.request_limit = absl::Seconds(1);
  options.attempts = 2;
  Start(std::move(options));
  exporter_->Add(Spans(1));
  ASSERT_TRUE(WaitFor(0, 0, 1));
  ASSERT_TRUE(Eventually([this] { return !warnings().empty(); }));
  EXPECT_THAT(warnings(), ElementsAre(HasSubstr("the answer took too long")));
  exporter_->Add(Spans(1));
  EXPECT_TRUE(WaitFor(1, 0, 1));
}

// Adding never waits, whatever the collector does: what does not fit is dropped and counted.
TEST_F(OtlpExporterTest, AFullQueueDrops) {
  collector_.AnswerWith({0});
  OtlpOptions options = Options();
  options.max_queue = 8;
  options.max_batch = 4;
  options.request_limit = absl::Hours(1);
  options.flush_limit = absl::Milliseconds(50);
  Start(std::move(options));
  exporter_->Add(Spans(4));
  ASSERT_TRUE(Eventually([this] { return collector_.requests().size() == 1; }));
  for (int i = 0; i < 100; ++i) exporter_->Add(Spans(1));
  EXPECT_TRUE(WaitFor(0, 92, 0));
  exporter_.reset();  // within the flush limit, of an hour
}

TEST_F(OtlpExporterTest, TheEndSendsWhatWaits) {
  OtlpOptions options = Options();
  options.interval = absl::Hours(1);
  options.flush_limit = absl::Seconds(60);
  Start(std::move(options));
  exporter_->Add(Spans(7));
  exporter_.reset();
  EXPECT_EQ(collector_.spans().size(), 7U);
}

TEST_F(OtlpExporterTest, TheEndTakesNoLongerThanItMay) {
  OtlpOptions options = Options();
  options.interval = absl::Hours(1);
  options.max_batch = 10;
  options.flush_limit = absl::ZeroDuration();
  Start(std::move(options));
  exporter_->Add(Spans(7));
  exporter_.reset();
  EXPECT_TRUE(collector_.requests().empty());
  EXPECT_THAT(warnings(), ElementsAre(HasSubstr("the end came before 7 spans were sent")));
}

TEST_F(OtlpExporterTest, ManyThreadsAdd) {
  Start(Options());
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([this] {
      for (int n = 0; n < 50; ++n) exporter_->Add(Spans(2));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(WaitFor(400, 0, 0));
  EXPECT_EQ(collector_.spans().size(), 400U);
}

TEST_F(OtlpExporterTest, EndpointsAreChecked) {
  const auto refused = [this](const std::string& endpoint, const std::string& authorities) {
    OtlpOptions options = Options();
    options.endpoint = endpoint;
    options.authorities = authorities;
    const absl::Status status = OtlpExporter::Start(std::move(options)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(refused("ftp://127.0.0.1/", ""), HasSubstr("'ftp://127.0.0.1/' is no http://"));
  EXPECT_THAT(refused("https://127.0.0.1/", "/no/such"),
              HasSubstr("otlp-authorities /no/such: no certificates"));
  EXPECT_THAT(refused("http://127.0.0.1/", "/no/such"),
              HasSubstr("needs an otlp-endpoint of https"));
}

// A collector over TLS, which shows a certificate of `names`.
class SecureCollectorTest : public OtlpExporterTest {
 protected:
  void Collect(const std::vector<std::string>& names, int seconds = 3600) {
    secure_ = std::make_unique<FakeCollector>(authority_.Sign(names, seconds));
  }
  OtlpOptions SecureOptions(const testkit::Authority& trusted) {
    std::ofstream(directory_.Path("ca.crt")) << trusted.certificate();
    OtlpOptions options = Options();
    options.endpoint = secure_->endpoint();
    options.authorities = directory_.Path("ca.crt");
    options.attempts = 2;
    return options;
  }
  // Nothing of the request leaves.
  void ExpectRefused(OtlpOptions options, const std::string& why = "certificate verify failed") {
    Start(std::move(options));
    exporter_->Add(Spans(1));
    ASSERT_TRUE(WaitFor(0, 0, 1));
    ASSERT_TRUE(Eventually([this] { return !warnings().empty(); }));
    EXPECT_THAT(warnings(), ElementsAre(HasSubstr("the TLS handshake: " + why)));
    EXPECT_TRUE(secure_->requests().empty());
  }

  testkit::Authority authority_;
  testkit::TemporaryDirectory directory_;
  std::unique_ptr<FakeCollector> secure_;
};

TEST_F(SecureCollectorTest, IsSentSpansByItsAddress) {
  Collect({"IP:127.0.0.1"});
  Start(SecureOptions(authority_));
  exporter_->Add(Spans(3));
  ASSERT_TRUE(WaitFor(3, 0, 0));
  EXPECT_EQ(secure_->spans().size(), 3U);
  exporter_->Add(Spans(1));  // on a connection of its own
  ASSERT_TRUE(WaitFor(4, 0, 0));
  EXPECT_TRUE(warnings().empty());
}

TEST_F(SecureCollectorTest, IsSentSpansByItsName) {
  Collect({"DNS:localhost"});
  OtlpOptions options = SecureOptions(authority_);
  const size_t at = options.endpoint.find("127.0.0.1");
  options.endpoint.replace(at, std::string("127.0.0.1").size(), "localhost");
  Start(std::move(options));
  exporter_->Add(Spans(1));
  EXPECT_TRUE(WaitFor(1, 0, 0));
}

TEST_F(SecureCollectorTest, IsNotSentThemWithoutItsAuthority) {
  Collect({"IP:127.0.0.1"});
  // Of the same name, so that the signature alone is wrong, which OpenSSL has other words for.
  ExpectRefused(SecureOptions(testkit::Authority()), "");
}

TEST_F(SecureCollectorTest, IsNotSentThemByTheSystemsAuthorities) {
  Collect({"IP:127.0.0.1"});
  OtlpOptions options = SecureOptions(authority_);
  options.authorities.clear();
  ExpectRefused(std::move(options));
}

TEST_F(SecureCollectorTest, IsNotSentThemUnderAnotherName) {
  Collect({"DNS:collector.test", "IP:127.0.0.2"});
  ExpectRefused(SecureOptions(authority_));
}

TEST_F(SecureCollectorTest, IsNotSentThemWithACertificateThatHasEnded) {
  Collect({"IP:127.0.0.1"}, -10);
  ExpectRefused(SecureOptions(authority_));
}

// One that does not speak TLS at all.
TEST_F(SecureCollectorTest, MustSpeakTls) {
  Collect({"IP:127.0.0.1"});
  OtlpOptions options = SecureOptions(authority_);
  options.endpoint = "https" + collector_.endpoint().substr(4);
  options.request_limit = absl::Seconds(1);
  Start(std::move(options));
  exporter_->Add(Spans(1));
  ASSERT_TRUE(WaitFor(0, 0, 1));
  EXPECT_TRUE(collector_.requests().empty());
}

}  // namespace
}  // namespace structkv::trace
