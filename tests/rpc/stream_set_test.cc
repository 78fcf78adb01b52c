#include "service/rpc/stream_set.h"

#include <memory>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"

namespace structkv::rpc {
namespace {

// Remembers what the set told it.
class FakeStream final : public Stream {
 public:
  void CheckLimits(int64_t now) override {
    absl::MutexLock lock(&mutex_);
    checks_.push_back(now);
  }
  void End(const absl::Status& status) override {
    absl::MutexLock lock(&mutex_);
    ends_.push_back(status);
  }

  // Waits until it was checked that often.
  std::vector<int64_t> WaitForChecks(size_t count) {
    absl::MutexLock lock(&mutex_);
    const auto enough = [&] { return checks_.size() >= count; };
    mutex_.Await(absl::Condition(&enough));
    return checks_;
  }
  size_t checks() {
    absl::MutexLock lock(&mutex_);
    return checks_.size();
  }
  std::vector<absl::Status> ends() {
    absl::MutexLock lock(&mutex_);
    return ends_;
  }

 private:
  absl::Mutex mutex_;
  std::vector<int64_t> checks_;
  std::vector<absl::Status> ends_;
};

TEST(StreamSetTest, CountsItsStreams) {
  StreamSet set(absl::Hours(1));
  const auto a = std::make_shared<FakeStream>();
  const auto b = std::make_shared<FakeStream>();
  EXPECT_EQ(set.size(), 0);
  set.Add(a);
  set.Add(b);
  EXPECT_EQ(set.size(), 2);
  set.Add(a);
  EXPECT_EQ(set.size(), 2) << "it was there";
  set.Remove(a.get());
  set.Remove(a.get());
  EXPECT_EQ(set.size(), 1);
}

TEST(StreamSetTest, ChecksLimitsAgainAndAgain) {
  StreamSet set(absl::Milliseconds(1));
  const auto stream = std::make_shared<FakeStream>();
  const auto other = std::make_shared<FakeStream>();
  const int64_t begin = SteadyNanos();
  set.Add(stream);
  set.Add(other);
  const std::vector<int64_t> checks = stream->WaitForChecks(5);
  other->WaitForChecks(3);
  EXPECT_GE(checks[0], begin);
  for (size_t i = 1; i < checks.size(); ++i) EXPECT_GE(checks[i], checks[i - 1]);
  EXPECT_LE(checks.back(), SteadyNanos());
}

TEST(StreamSetTest, LeavesRemovedStreamsAlone) {
  StreamSet set(absl::Milliseconds(1));
  const auto removed = std::make_shared<FakeStream>();
  const auto stays = std::make_shared<FakeStream>();
  set.Add(removed);
  set.Add(stays);
  removed->WaitForChecks(1);
  set.Remove(removed.get());
  // A check that had begun may still come; after one whole round of another stream none does.
  stays->WaitForChecks(stays->checks() + 2);
  const size_t checks = removed->checks();
  stays->WaitForChecks(stays->checks() + 3);
  EXPECT_EQ(removed->checks(), checks);
}

TEST(StreamSetTest, DoesNotKeepStreamsAlive) {
  StreamSet set(absl::Milliseconds(1));
  auto gone = std::make_shared<FakeStream>();
  const std::weak_ptr<FakeStream> watched = gone;
  const auto stays = std::make_shared<FakeStream>();
  set.Add(gone);
  gone.reset();
  set.Add(stays);
  stays->WaitForChecks(2);
  EXPECT_TRUE(watched.expired());
  set.EndAll(absl::AbortedError("over"));
  EXPECT_EQ(stays->ends().size(), 1);
}

TEST(StreamSetTest, EndsEveryStream) {
  StreamSet set(absl::Hours(1));
  std::vector<std::shared_ptr<FakeStream>> streams(5);
  for (auto& stream : streams) {
    stream = std::make_shared<FakeStream>();
    set.Add(stream);
  }
  set.Remove(streams[4].get());
  EXPECT_EQ(set.ended(), absl::OkStatus());
  set.EndAll(absl::UnavailableError("draining"));
  EXPECT_EQ(set.ended(), absl::UnavailableError("draining"));
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(streams[i]->ends(), std::vector<absl::Status>{absl::UnavailableError("draining")});
  }
  EXPECT_TRUE(streams[4]->ends().empty());
  EXPECT_EQ(set.size(), 4) << "streams remove themselves";
}

TEST(StreamSetTest, WaitsUntilTheLastStreamIsGone) {
  StreamSet set(absl::Hours(1));
  EXPECT_TRUE(set.WaitUntilEmpty(absl::ZeroDuration()));
  const auto stream = std::make_shared<FakeStream>();
  set.Add(stream);
  EXPECT_FALSE(set.WaitUntilEmpty(absl::ZeroDuration()));
  EXPECT_FALSE(set.WaitUntilEmpty(absl::Milliseconds(5)));
  std::thread remover([&] { set.Remove(stream.get()); });
  EXPECT_TRUE(set.WaitUntilEmpty(absl::InfiniteDuration()));
  remover.join();
}

}  // namespace
}  // namespace structkv::rpc
