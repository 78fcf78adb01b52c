// Sessions whose rows are pulled, in random pieces, orders and paces: the answer is that of whole
// layers, and no more memory is held than was reserved. The seed is printed; STRUCTKV_TEST_SEED
// sets it.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/backend_registry.h"
#include "service/session/session.h"
#include "tests/kernels/random_tensor.h"
#include "tests/session/session_probe.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"
#include "tests/testing/pull.h"

namespace structkv::session {
namespace {

using engine::InputTensor;

struct Kind {
  const char* name;  // of PromptCases
  engine::Pull pull;
};
constexpr Kind kKinds[] = {
    {"StructKvEverythingReturned", engine::Pull::kValues},
    {"StructKvPerKvHead", engine::Pull::kValues},
    {"StructKvLse", engine::Pull::kValues},
    {"StructKvFixed", engine::Pull::kValues},
    {"StructKvKeepsAll", engine::Pull::kValues},
    {"StructKvSaliency", engine::Pull::kKeysAndValues},
    {"StructKvSaliencyPerKvHeadEach", engine::Pull::kKeysAndValues},
    {"StructKvSaliency", engine::Pull::kValues},
    {"SnapKv", engine::Pull::kValues},
};

// A worker that sends what it may whenever it is asked, at random.
class RandomWorker {
 public:
  RandomWorker(const testkit::PromptData& data, const SessionRequest& request,
               testkit::Random* random)
      : data_(data), request_(request), random_(*random) {
    for (int64_t layer = 0; layer < layers(); ++layer) {
      for (const PieceBytes& piece : LayerPieces(data, request.spec, layer)) Cut(piece);
    }
  }

  int64_t layers() const { return request_.spec.geometry.layers; }
  int64_t sent_bytes() const { return sent_bytes_; }
  bool sent_all() const {
    return unsent_.empty() && static_cast<int64_t>(pulled_.size()) == layers();
  }

  // Takes note of what the server asked for.
  void Take(const std::map<int64_t, engine::RowPull>& pulls) {
    for (const auto& [layer, pull] : pulls) {
      if (!pulled_.insert(layer).second) continue;
      for (const InputTensor tensor : {InputTensor::kKeys, InputTensor::kValues}) {
        if (!request_.spec.pulls(tensor)) continue;
        Cut({.layer = layer,
             .tensor = tensor,
             .bytes = testkit::PulledRows(data_, static_cast<uint32_t>(layer), ProtoTensor(tensor),
                                          pull.positions, request_.spec.per_kv_head())});
      }
    }
  }

  // Some pieces that may be sent now, and some that were sent before; none where there is none.
  std::vector<PieceBytes> NextMessage() {
    std::vector<PieceBytes> pieces;
    const int64_t count = random_.Between(1, 5);
    for (int64_t i = 0; i < count; ++i) {
      std::vector<size_t> allowed;
      for (size_t at = 0; at < unsent_.size(); ++at) {
        if (unsent_[at].layer < LowestUnfinished() + request_.layers_in_flight) {
          allowed.push_back(at);
        }
      }
      if (allowed.empty()) break;
      const auto last = static_cast<int64_t>(allowed.size()) - 1;
      const size_t at = allowed[static_cast<size_t>(random_.Between(0, last))];
      pieces.push_back(unsent_[at]);
      sent_bytes_ += static_cast<int64_t>(unsent_[at].bytes.size());
      if (random_.Chance(10)) pieces.push_back(unsent_[at]);
      unsent_.erase(unsent_.begin() + static_cast<ptrdiff_t>(at));
    }
    return pieces;
  }

 private:
  int64_t LowestUnfinished() const {
    int64_t lowest = layers();
    for (const PieceBytes& piece : unsent_) lowest = std::min(lowest, piece.layer);
    for (int64_t layer = 0; layer < lowest; ++layer) {
      if (!pulled_.contains(layer)) return layer;
    }
    return lowest;
  }

  void Cut(const PieceBytes& whole) {
    const auto size = static_cast<int64_t>(whole.bytes.size());
    for (int64_t begin = 0; begin < size;) {
      const int64_t end = random_.Chance(50) ? size : random_.Between(begin + 1, size);
      PieceBytes piece = whole;
      piece.offset = begin;
      piece.bytes =
          whole.bytes.substr(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
      unsent_.push_back(std::move(piece));
      begin = end;
    }
  }

  const testkit::PromptData& data_;
  const SessionRequest& request_;
  testkit::Random& random_;
  std::vector<PieceBytes> unsent_;
  std::set<int64_t> pulled_;
  int64_t sent_bytes_ = 0;
};

// Runs a prompt to its end, a random part of its results sent at a time.
void RunAtRandom(SessionManager& manager, const testkit::PromptData& data,
                 const SessionRequest& request, testkit::Random* random, Seen* seen) {
  const absl::StatusOr<std::shared_ptr<Session>> session = manager.Open(request);
  ASSERT_TRUE(session.ok()) << session.status();
  const auto probe = std::make_shared<Probe>();
  RandomWorker worker(data, request, random);
  (*session)->Start(probe->Callbacks());
  int messages = 0;
  bool committed = false;
  const auto report = [&](int64_t bytes) {
    probe->Sent(bytes);
    (*session)->OutputSent(bytes);
  };
  while (true) {
    *seen = probe->seen();
    ASSERT_FALSE(seen->failed.has_value()) << *seen->failed;
    worker.Take(seen->pulls);
    if (seen->unsent_bytes > 0 && random->Chance(40)) {
      report(random->Between(1, seen->unsent_bytes));
      continue;
    }
    if (seen->finished.has_value()) {
      report(seen->unsent_bytes);
      return;
    }
    if (!committed && seen->ready > messages) {
      const std::vector<PieceBytes> pieces = worker.NextMessage();
      if (!pieces.empty()) {
        ++messages;
        (*session)->Append(MessageOf(pieces, static_cast<size_t>(random->Between(1, 3))));
        continue;
      }
      if (worker.sent_all()) {
        committed = true;
        (*session)->Commit(worker.layers(), worker.sent_bytes());
        continue;
      }
    }
    // Nothing can be sent: the server must ask for more, by itself or once it has sent its results.
    if (seen->unsent_bytes > 0) report(seen->unsent_bytes);
    ASSERT_TRUE(probe->WaitFor([&](const Seen& now) {
      return now.finished.has_value() || now.failed.has_value() || now.unsent_bytes > 0 ||
             now.pulls.size() > seen->pulls.size() || now.ready > std::max(seen->ready, messages);
    }));
  }
}

TEST(SessionPullTest, AnyOrderAndPaceGivesTheAnswerOfWholeLayersWithinTheReservation) {
  constexpr int kRuns = 60;
  for (int i = 0; i < kRuns; ++i) {
    const uint64_t seed = testing::Seed() + static_cast<uint64_t>(i);
    testkit::Random random(seed);
    const Kind& kind = kKinds[static_cast<size_t>(i) % std::size(kKinds)];
    SCOPED_TRACE(absl::StrCat("seed ", seed, ", ", kind.name));
    v1::Open open = testkit::FindCase(kind.name).open;
    open.set_prompt_tokens(static_cast<uint32_t>(random.Between(60, 1500)));
    const bool large = !open.window_lse() && random.Chance(50) &&
                       testkit::Effective(open).statistic == v1::STATISTIC_WINDOW_QUERIES;
    if (large) MakeLarge(&open);  // computed on the scheduler's threads
    const testkit::PromptData data(open, seed);
    SessionManager manager({.idle_buffer_bytes = 0, .threads = 2}, *CreateBackend("auto"));
    engine::BufferPool pool(0);
    const absl::StatusOr<testkit::Answer> expected = testkit::CompressDirectly(
        data, manager.backend(), &pool, testkit::InOrder(data.layers()), SerialFor);
    ASSERT_TRUE(expected.ok()) << expected.status();
    SessionRequest request{.spec = testkit::SpecOf(open)};
    request.spec.pull = kind.pull;
    request.layers_in_flight = random.Between(1, request.spec.geometry.layers);
    const int64_t reserved = (*manager.Open(request))->reserved_bytes();
    Seen seen;
    ASSERT_NO_FATAL_FAILURE(RunAtRandom(manager, data, request, &random, &seen));
    EXPECT_TRUE(seen.faults.empty()) << ::testing::PrintToString(seen.faults);
    EXPECT_TRUE(testkit::ResultBytes(seen.answer) == testkit::ResultBytes(*expected));
    EXPECT_LE(static_cast<int64_t>(manager.buffers().peak_in_use_bytes()), reserved);
    EXPECT_TRUE(Eventually([&] {
      return manager.budget().reserved_bytes() == 0 && manager.buffers().in_use_bytes() == 0;
    }));
  }
}

}  // namespace
}  // namespace structkv::session
