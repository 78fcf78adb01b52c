// Sends spans to a collector, as OTLP over HTTP in its JSON encoding.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/trace/http_post.h"
#include "service/trace/span.h"

namespace structkv::trace {

struct OtlpOptions {
  // http[s]://HOST[:PORT][/PATH], of the collector's traces.
  std::string endpoint;
  // As HttpPoster::Make.
  std::string authorities;
  // Who sends: `service.name` and what else is known.
  std::vector<Attribute> resource;
  // Spans that may wait; more are dropped. Some 1 KiB each.
  size_t max_queue = 8192;
  // Spans of one request, at most.
  size_t max_batch = 512;
  // How long a span waits for others to go with it.
  absl::Duration interval = absl::Seconds(1);
  // Of one request, and how often it is made in all: again after what a collector may answer while
  // it is overloaded or away (429, 502, 503, 504, nothing), with waits that double.
  absl::Duration request_limit = absl::Seconds(10);
  int attempts = 5;
  absl::Duration first_backoff = absl::Milliseconds(500);
  absl::Duration max_backoff = absl::Seconds(8);
  // What the end may take for spans that wait.
  absl::Duration flush_limit = absl::Seconds(2);
  // Is told, on the exporter's thread, when spans begin to be lost; may be null.
  std::function<void(const std::string&)> warn;
};

// Spans since the start.
struct ExportCounts {
  int64_t exported = 0;
  int64_t dropped = 0;  // too many waited
  int64_t failed = 0;   // the collector was not there, or did not take them
};

// Thread-safe. Runs one thread.
class OtlpExporter {
 public:
  // INVALID_ARGUMENT for an endpoint that is no such URL, and as HttpPoster::Make.
  static absl::StatusOr<std::unique_ptr<OtlpExporter>> Start(OtlpOptions options);
  // Sends what waits, within the flush limit.
  ~OtlpExporter();

  // Waits for nothing.
  void Add(std::vector<Span> spans);

  ExportCounts counts() const;

 private:
  OtlpExporter(OtlpOptions options, std::unique_ptr<HttpPoster> poster)
      : options_(std::move(options)), poster_(std::move(poster)) {}

  void Run();
  // What is to be sent next; empty: it is over.
  std::vector<Span> NextBatch();
  bool IsPastEnd() const;
  // Counts a batch, and all that waits, as failed.
  void GiveUp(size_t batch);
  void Send(const std::vector<Span>& batch);
  // OK with the number of spans that were not taken; UNAVAILABLE where it may be tried again, after
  // `*wait` at the least.
  absl::StatusOr<int64_t> TryOnce(const std::string& body, absl::Duration* wait);
  // False: it is over.
  bool WaitToTryAgain(absl::Duration wait);
  void Lost(const absl::Status& why);

  const OtlpOptions options_;
  const std::unique_ptr<HttpPoster> poster_;
  bool losing_ = false;  // the thread's

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Span> queue_;
  bool stopping_ = false;
  std::chrono::steady_clock::time_point end_;  // where it is stopping
  ExportCounts counts_;

  std::thread thread_;
};

}  // namespace structkv::trace
