#include "service/rpc/stream_set.h"

#include <chrono>
#include <utility>
#include <vector>

#include "boost/asio/executor_work_guard.hpp"
#include "boost/asio/io_context.hpp"
#include "boost/asio/steady_timer.hpp"

namespace structkv::rpc {

int64_t SteadyNanos() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// A timer that goes off again and again on the thread that runs it.
class StreamSet::Ticker {
 public:
  Ticker(absl::Duration tick, std::function<void()> handler)
      : tick_(absl::ToChronoNanoseconds(tick)), handler_(std::move(handler)), timer_(io_) {
    Arm();
  }
  void Run() { io_.run(); }
  void Stop() { io_.stop(); }

 private:
  void Arm() {
    timer_.expires_after(tick_);
    timer_.async_wait([this](const boost::system::error_code& error) {
      if (error) return;
      handler_();
      Arm();
    });
  }

  const std::chrono::nanoseconds tick_;
  const std::function<void()> handler_;
  boost::asio::io_context io_{1};
  boost::asio::steady_timer timer_;
};

StreamSet::StreamSet(absl::Duration tick, std::function<void()> also)
    : also_(std::move(also)),
      ticker_(std::make_unique<Ticker>(tick, [this] { Tick(); })),
      thread_([this] { ticker_->Run(); }) {}

StreamSet::~StreamSet() {
  ticker_->Stop();
  thread_.join();
}

void StreamSet::Add(const std::shared_ptr<Stream>& stream) {
  absl::MutexLock lock(&mutex_);
  streams_.emplace(stream.get(), stream);
}

void StreamSet::Remove(const Stream* stream) {
  absl::MutexLock lock(&mutex_);
  streams_.erase(stream);
}

int64_t StreamSet::size() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(streams_.size());
}

std::vector<std::shared_ptr<Stream>> StreamSet::All() const {
  std::vector<std::shared_ptr<Stream>> streams;
  absl::MutexLock lock(&mutex_);
  for (const auto& [key, stream] : streams_) {
    if (auto alive = stream.lock()) streams.push_back(std::move(alive));
  }
  return streams;
}

void StreamSet::Tick() {
  if (also_) also_();
  const std::vector<std::shared_ptr<Stream>> streams = All();
  if (streams.empty()) return;
  const int64_t now = SteadyNanos();
  for (const auto& stream : streams) stream->CheckLimits(now);
}

void StreamSet::EndAll(const absl::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    ended_ = status;
  }
  for (const auto& stream : All()) stream->End(status);
}

absl::Status StreamSet::ended() const {
  absl::MutexLock lock(&mutex_);
  return ended_;
}

std::vector<PromptReport> StreamSet::Report() const {
  std::vector<PromptReport> prompts;
  for (const auto& stream : All()) stream->Report(&prompts);
  return prompts;
}

bool StreamSet::WaitUntilEmpty(absl::Duration limit) {
  absl::MutexLock lock(&mutex_);
  const auto empty = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return streams_.empty(); };
  return mutex_.AwaitWithTimeout(absl::Condition(&empty), limit);
}

}  // namespace structkv::rpc
