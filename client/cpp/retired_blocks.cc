#include "client/cpp/retired_blocks.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <thread>
#include <tuple>
#include <utility>

#include "absl/synchronization/blocking_counter.h"
#include "client/cpp/region_call.h"
#include "client/cpp/registration_lease.h"

namespace structkv::client::internal {
namespace {

constexpr absl::Duration kWatchInterval = absl::Seconds(1);

// How long a server that gives no sign of life may use the region.
absl::Duration PatienceOf(const RegionOptions& options) {
  const bool leased = options.kind != RegionKind::kDescriptor;
  return (leased ? LeaseOf(options) : absl::ZeroDuration()) + options.quarantine;
}

// A call of GetRegion.
struct Question {
  grpc::ClientContext context;
  v1::GetRegionRequest request;
  v1::GetRegionResponse response;
  absl::Status status;
};

// What the servers say of the blocks' regions: each is asked once, and all at the same time.
class Answers {
 public:
  Answers(const std::vector<RetiredBlock>& blocks, absl::Time deadline) {
    for (const RetiredBlock& block : blocks) questions_.try_emplace(KeyOf(block));
    absl::BlockingCounter due(static_cast<int>(questions_.size()));
    for (const RetiredBlock& block : blocks) {
      Question& question = questions_[KeyOf(block)];
      if (!question.request.handle().empty()) continue;  // asked
      question.request.set_handle(block.handle);
      Prepare(block.server, deadline, &question.context);
      v1::Regions::NewStub(block.server.channel)
          ->async()
          ->GetRegion(&question.context, &question.request, &question.response,
                      [&](const grpc::Status& status) {
                        question.status = ToStatus(status);
                        due.DecrementCount();
                      });
    }
    due.Wait();
  }

  const Question& Of(const RetiredBlock& block) const { return questions_.at(KeyOf(block)); }

 private:
  using Key = std::tuple<const grpc::Channel*, std::string, std::string>;

  static Key KeyOf(const RetiredBlock& block) {
    return {block.server.channel.get(), block.server.tenant, block.handle};
  }

  std::map<Key, Question> questions_;
};

}  // namespace

RetiredBlocks& RetiredBlocks::All() {
  static auto* const all = new RetiredBlocks();
  return *all;
}

void RetiredBlocks::Add(RetiredBlock block) {
  {
    absl::MutexLock lock(&mutex_);
    retired_.push_back(std::move(block));
    if (std::exchange(watched_, true)) return;
  }
  std::thread([this] { Watch(); }).detach();
}

void RetiredBlocks::Watch() {
  while (true) {
    absl::SleepFor(kWatchInterval);
    Release({}, absl::Now() + kWatchInterval);
    absl::MutexLock lock(&mutex_);
    watched_ = !retired_.empty() || asked_ > 0;
    if (!watched_) return;
  }
}

void RetiredBlocks::Release(absl::Span<const std::shared_ptr<Region>> regions,
                            absl::Time deadline) {
  std::vector<RetiredBlock> asked;
  {
    absl::MutexLock lock(&mutex_);
    const auto others = std::partition(retired_.begin(), retired_.end(), [&](const auto& retired) {
      return !regions.empty() &&
             std::find(regions.begin(), regions.end(), retired.region) == regions.end();
    });
    std::move(others, retired_.end(), std::back_inserter(asked));
    retired_.erase(others, retired_.end());
    asked_ += static_cast<int>(asked.size());
  }
  const int count = static_cast<int>(asked.size());
  const Answers answers(asked, std::min(deadline, absl::Now() + kRegionCallLimit));
  std::vector<RetiredBlock> kept;
  for (RetiredBlock& retired : asked) {
    const Question& answer = answers.Of(retired);
    if (answer.status.ok() || retired.region->IsRegistered(retired.server, retired.handle)) {
      retired.heard = absl::Now();
    }
    // A region that is not known any more is not mapped either.
    const bool unused =
        answer.status.ok() ? answer.response.use_count() == 0 : absl::IsNotFound(answer.status);
    const bool over = absl::Now() - retired.heard > PatienceOf(retired.region->options());
    if (!unused && !over) kept.push_back(std::move(retired));
  }
  asked.clear();
  absl::MutexLock lock(&mutex_);
  asked_ -= count;
  for (RetiredBlock& retired : kept) retired_.push_back(std::move(retired));
}

size_t RetiredBlocks::size() const {
  absl::MutexLock lock(&mutex_);
  return retired_.size();
}

}  // namespace structkv::client::internal
