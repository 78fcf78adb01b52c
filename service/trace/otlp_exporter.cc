#include "service/trace/otlp_exporter.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "service/trace/otlp_json.h"

namespace structkv::trace {
namespace {

constexpr char kContentType[] = "application/json";

// Those that OTLP's specification names.
bool MayBeTriedAgain(int status) {
  return status == 429 || status == 502 || status == 503 || status == 504;
}

}  // namespace

absl::StatusOr<std::unique_ptr<OtlpExporter>> OtlpExporter::Start(OtlpOptions options) {
  absl::StatusOr<HttpUrl> url = ParseHttpUrl(options.endpoint);
  if (!url.ok()) return url.status();
  auto poster = HttpPoster::Make(*std::move(url), options.authorities);
  if (!poster.ok()) return poster.status();
  std::unique_ptr<OtlpExporter> exporter(new OtlpExporter(std::move(options), *std::move(poster)));
  exporter->thread_ = std::thread([exporter = exporter.get()] { exporter->Run(); });
  return exporter;
}

OtlpExporter::~OtlpExporter() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    end_ = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(options_.flush_limit);
  }
  changed_.notify_all();
  poster_->Hurry(options_.flush_limit);
  thread_.join();
}

void OtlpExporter::Add(std::vector<Span> spans) {
  bool full = false;
  {
    const std::lock_guard lock(mutex_);
    const size_t room = options_.max_queue - std::min(options_.max_queue, queue_.size());
    const size_t taken = std::min(room, spans.size());
    counts_.dropped += static_cast<int64_t>(spans.size() - taken);
    const bool was_empty = queue_.empty();
    std::move(spans.begin(), spans.begin() + static_cast<int64_t>(taken),
              std::back_inserter(queue_));
    full = queue_.size() >= options_.max_batch || was_empty;
  }
  if (full) changed_.notify_all();
}

ExportCounts OtlpExporter::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

void OtlpExporter::Run() {
  while (true) {
    const std::vector<Span> batch = NextBatch();
    if (batch.empty()) return;
    if (IsPastEnd()) return GiveUp(batch.size());
    Send(batch);
  }
}

bool OtlpExporter::IsPastEnd() const {
  const std::lock_guard lock(mutex_);
  return stopping_ && std::chrono::steady_clock::now() >= end_;
}

void OtlpExporter::GiveUp(size_t batch) {
  size_t lost = batch;
  {
    const std::lock_guard lock(mutex_);
    lost += queue_.size();
    queue_.clear();
    counts_.failed += static_cast<int64_t>(lost);
  }
  Lost(absl::DeadlineExceededError(absl::StrCat("the end came before ", lost, " spans were sent")));
}

std::vector<Span> OtlpExporter::NextBatch() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
  changed_.wait_for(lock, absl::ToChronoNanoseconds(options_.interval),
                    [this] { return stopping_ || queue_.size() >= options_.max_batch; });
  const auto end =
      queue_.begin() + static_cast<int64_t>(std::min(options_.max_batch, queue_.size()));
  std::vector<Span> batch(std::make_move_iterator(queue_.begin()), std::make_move_iterator(end));
  queue_.erase(queue_.begin(), end);
  return batch;
}

void OtlpExporter::Send(const std::vector<Span>& batch) {
  const std::string body = EncodeOtlp(options_.resource, batch);
  absl::Duration backoff = options_.first_backoff;
  absl::StatusOr<int64_t> rejected = 0;
  for (int attempt = 1;; ++attempt) {
    absl::Duration wait = backoff;
    rejected = TryOnce(body, &wait);
    if (rejected.ok() || !absl::IsUnavailable(rejected.status())) break;
    if (attempt >= options_.attempts || !WaitToTryAgain(std::min(wait, options_.max_backoff))) {
      break;
    }
    backoff = std::min(2 * backoff, options_.max_backoff);
  }
  const auto spans = static_cast<int64_t>(batch.size());
  const int64_t failed = rejected.ok() ? std::min(*rejected, spans) : spans;
  {
    const std::lock_guard lock(mutex_);
    counts_.failed += failed;
    counts_.exported += spans - failed;
  }
  if (rejected.ok()) {
    losing_ = false;
  } else {
    Lost(rejected.status());
  }
}

absl::StatusOr<int64_t> OtlpExporter::TryOnce(const std::string& body, absl::Duration* wait) {
  absl::StatusOr<HttpReply> reply = poster_->Post(kContentType, body, options_.request_limit);
  if (!reply.ok()) return absl::UnavailableError(reply.status().message());
  if (reply->status >= 200 && reply->status < 300) return RejectedSpans(reply->body);
  const std::string text = absl::StrCat("the collector answered with ", reply->status);
  if (!MayBeTriedAgain(reply->status)) return absl::InternalError(text);
  *wait = std::max(*wait, reply->retry_after.value_or(absl::ZeroDuration()));
  return absl::UnavailableError(text);
}

bool OtlpExporter::WaitToTryAgain(absl::Duration wait) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, absl::ToChronoNanoseconds(wait), [this] { return stopping_; });
  // At the end there is no time to wait: what was refused once is lost.
  return !stopping_;
}

void OtlpExporter::Lost(const absl::Status& why) {
  if (std::exchange(losing_, true) || !options_.warn) return;
  options_.warn(absl::StrCat(options_.endpoint, ": ", std::string(why.message()),
                             "; spans are lost until it takes them again"));
}

}  // namespace structkv::trace
