#include "tests/session/group_driver.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "service/session/session_plan.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/shards.h"

namespace structkv::session {
namespace {

v1::Open RandomOpen(uint32_t tokens, testkit::Random* random) {
  v1::Open open = testkit::SmallOpen(tokens);
  constexpr v1::Statistic kStatistics[] = {
      v1::STATISTIC_WINDOW_QUERIES, v1::STATISTIC_SALIENCY_PER_KV_HEAD, v1::STATISTIC_SALIENCY};
  open.set_statistic(kStatistics[random->Between(0, 2)]);
  if (random->Chance(50)) open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  if (random->Chance(30)) open.set_output(v1::OUTPUT_PLAN);
  if (random->Chance(30)) testkit::PageAtRandom(16, 1, random->Next(), &open);
  // Computed on the scheduler's threads.
  if (open.statistic() == v1::STATISTIC_WINDOW_QUERIES && random->Chance(50)) MakeLarge(&open);
  return open;
}

// Puts a NaN where the layer's statistics show it.
void Spoil(testkit::PromptData* part, uint32_t layer) {
  const bool given = !part->tensor(layer, v1::TENSOR_SALIENCY).empty();
  testkit::SetElement(
      given ? v1::DTYPE_F32 : part->open().dtype(), std::nanf(""), 3,
      part->mutable_tensor(layer, given ? v1::TENSOR_SALIENCY : v1::TENSOR_WINDOW_QUERIES));
}

}  // namespace

GroupScenario::GroupScenario(std::string name, uint32_t tokens, testkit::Random* random,
                             const Backend& backend)
    : id(std::move(name)) {
  const testkit::PromptData whole(RandomOpen(tokens, random), random->Next());
  const auto count = uint32_t{1} << random->Between(0, 2);
  parts = testkit::SplitByRanks(whole, count, id);
  spec = testkit::SpecOf(whole.open());
  engine::BufferPool pool(0);
  const absl::StatusOr<testkit::Answer> direct =
      testkit::CompressDirectly(whole, backend, &pool, testkit::InOrder(whole.layers()), SerialFor);
  EXPECT_TRUE(direct.ok()) << direct.status();
  for (uint32_t rank = 0; rank < count; ++rank) {
    const v1::ShardGroup& group = parts[rank].open().shard_group();
    expected.push_back(testkit::SliceAnswer(whole.open(), *direct, group));
    names.push_back(absl::StrCat(id, "/", rank));
    own.push_back(engine::ShardSpec(spec, *engine::EvenShard(spec.geometry, count, rank)));
  }
  calm = random->Chance(40);
  if (calm || random->Chance(70)) return;
  bad = {.rank = random->Between(0, ranks() - 1), .layer = random->Between(0, layers() - 1)};
  bad->shared =
      spec.statistic == engine::Statistic::kWindowQueries && ranks() > spec.geometry.kv_heads;
  Spoil(&parts[static_cast<size_t>(bad->rank)], static_cast<uint32_t>(bad->layer));
}

SessionRequest GroupScenario::Request(int64_t rank, bool key) const {
  SessionRequest request = {.spec = spec, .layers_in_flight = layers()};
  if (key) request.idempotency_key = Name(rank);
  request.shard = engine::ShardMember{.group_id = id,
                                      .shard_count = ranks(),
                                      .shard_index = rank,
                                      .heads = *engine::EvenShard(spec.geometry, ranks(), rank)};
  request.agreed = {{"open.model_id", "m"}};
  return request;
}

GroupDriver::GroupDriver(const GroupScenario& scenario, SessionManager* manager,
                         testkit::Random* random)
    : scenario_(scenario),
      manager_(*manager),
      random_(*random),
      keys_(random->Chance(50)),
      model_(scenario.id, scenario.ranks(), scenario.layers(), scenario.bad),
      ranks_(static_cast<size_t>(scenario.ranks())) {}

void GroupDriver::Log(int64_t rank, const char* what) {
  absl::StrAppend(&log_, what, " ", rank, "; ");
}

int64_t GroupDriver::active_sessions() const {
  return std::count_if(ranks_.begin(), ranks_.end(),
                       [](const Rank& rank) { return rank.session != nullptr; });
}

int64_t GroupDriver::reserved_bytes() const {
  int64_t bytes = 0;
  for (const Rank& rank : ranks_) {
    if (rank.session != nullptr) bytes += rank.session->reserved_bytes();
  }
  return bytes;
}

void GroupDriver::Step() {
  const int64_t rank = random_.Between(0, scenario_.ranks() - 1);
  if (!scenario_.calm && random_.Chance(6) && active_sessions() > 0) {
    DoWrong(rank);
  } else if (At(rank).session == nullptr) {
    Open(rank);
  } else {
    SendNext(rank);
  }
  Check();
}

void GroupDriver::Open(int64_t rank) {
  Log(rank, "open");
  const SessionRequest request = scenario_.Request(rank, keys_);
  const int64_t available = manager_.budget().limit_bytes() - manager_.budget().reserved_bytes();
  const int64_t needed = PlanSession(request, manager_.backend())->reserved_bytes;
  absl::StatusOr<std::shared_ptr<Session>> session = manager_.Open(request);
  if (needed > available) {  // the others go on waiting
    EXPECT_EQ(session.status().code(), absl::StatusCode::kResourceExhausted) << session.status();
    return;
  }
  ASSERT_TRUE(session.ok()) << session.status();
  At(rank) = {.session = *std::move(session), .probe = std::make_shared<Probe>()};
  At(rank).session->Start(At(rank).probe->Callbacks());
  model_.Join(rank);
}

// What cannot be a rank beside those that have joined.
void GroupDriver::OpenBadly(int64_t rank) {
  Log(rank, "open badly");
  SessionRequest request = scenario_.Request(rank);
  const int64_t joined = std::find_if(ranks_.begin(), ranks_.end(),
                                      [](const Rank& each) { return each.session != nullptr; }) -
                         ranks_.begin();
  switch (random_.Between(0, 2)) {
    case 0:
      request.agreed = {{"open.model_id", "another"}};
      break;
    case 1:
      request = scenario_.Request(joined);
      break;
    default:
      if (scenario_.ranks() < scenario_.spec.geometry.query_heads) {
        ++request.shard->shard_count;
      } else {
        request.agreed.emplace_back("open.pull", "VALUES");
      }
      break;
  }
  EXPECT_EQ(manager_.Open(request).status().code(), absl::StatusCode::kInvalidArgument);
  if (model_.waiting()) model_.EndWait(absl::StatusCode::kInvalidArgument);
}

// The same rank once more, by its name for retries.
void GroupDriver::OpenAgain(int64_t rank) {
  Log(rank, "open again");
  const Rank old = At(rank);
  const bool waits = model_.waiting();
  absl::StatusOr<std::shared_ptr<Session>> session = manager_.Open(scenario_.Request(rank, true));
  ASSERT_TRUE(session.ok()) << session.status();
  if (!waits) {  // of a new group of that name, which is another story
    model_.Leave(rank, absl::StatusCode::kAborted);
    session->reset();
    return;
  }
  EXPECT_EQ(old.probe->seen().failed.value_or(absl::OkStatus()).code(), absl::StatusCode::kAborted);
  model_.Release(rank);
  At(rank) = {.session = *std::move(session), .probe = std::make_shared<Probe>()};
  At(rank).session->Start(At(rank).probe->Callbacks());
  model_.Join(rank);
}

void GroupDriver::SendNext(int64_t rank) {
  const int64_t layer = model_.sent(rank);
  Session& session = *At(rank).session;
  const auto index = static_cast<size_t>(rank);
  if (layer < scenario_.layers()) {
    Log(rank, "send");
    model_.Send(rank);
    session.Append(MessageOf(LayerPieces(scenario_.parts[index], scenario_.own[index], layer),
                             static_cast<size_t>(random_.Between(1, 3))));
  } else if (!model_.committed(rank)) {
    Log(rank, "commit");
    model_.Commit(rank);
    session.Commit(scenario_.layers(), static_cast<int64_t>(scenario_.parts[index].total_bytes()));
    session.EndOfInput();
  }
}

void GroupDriver::DoWrong(int64_t rank) {
  const int64_t kind = random_.Between(0, 7);
  if (kind == 0) return OpenBadly(rank);
  std::shared_ptr<Session> session = At(rank).session;
  if (session == nullptr) return;
  switch (kind) {
    case 1:
      Log(rank, "cancel");
      model_.Leave(rank, std::nullopt);
      if (random_.Chance(50)) session->Cancel();
      At(rank).session.reset();
      return;
    case 2:
      Log(rank, "fail");
      model_.Leave(rank, absl::StatusCode::kDeadlineExceeded);
      session->Fail(absl::DeadlineExceededError("too slow"));
      return;
    case 3:
      Log(rank, "end of input");
      if (model_.committed(rank)) return;
      model_.Leave(rank, absl::StatusCode::kInvalidArgument);
      session->EndOfInput();
      return;
    case 4:
      Log(rank, "wrong commit");
      model_.Leave(rank, absl::StatusCode::kInvalidArgument);
      session->Commit(scenario_.layers(), 1);
      return;
    case 5:
      if (keys_) OpenAgain(rank);
      return;
    case 6:
      Log(rank, "too late");
      if (model_.waiting()) {
        model_.EndWait(absl::StatusCode::kDeadlineExceeded);
        session->CheckPeers(absl::ZeroDuration());
      } else {
        // Ranks that wait for one another, as here they may, are left alone.
        session->CheckPeers(absl::InfiniteDuration());
      }
      return;
    default:
      if (model_.committed(rank) || model_.sent(rank) == scenario_.layers()) return;
      Log(rank, "bad piece");
      model_.Leave(rank, absl::StatusCode::kOutOfRange);
      session->Append(MessageOf({{.layer = scenario_.layers(), .bytes = "bytes"}}));
      return;
  }
}

void GroupDriver::ExpectWaitEnded(absl::StatusCode code) {
  if (!waits()) return;
  model_.EndWait(code);
  Check();
}

bool GroupDriver::Matches(int64_t rank, const Seen& seen) const {
  if (model_.failed(rank).has_value() || model_.finished()) {
    return seen.failed.has_value() || seen.finished.has_value();
  }
  return static_cast<int64_t>(seen.answer.order.size()) == model_.answered() &&
         seen.ready == model_.sent(rank) + 1;
}

void GroupDriver::Check() {
  SCOPED_TRACE(log_);
  // Each takes its answers at once: the group waits for room in all of them.
  const auto matches = [this](int64_t rank) {
    const Rank& each = At(rank);
    if (each.session == nullptr) return true;
    int64_t unsent_bytes = 0;
    const bool as_the_model = each.probe->Is([&](const Seen& seen) {
      unsent_bytes = seen.unsent_bytes;
      return Matches(rank, seen);
    });
    each.probe->Sent(unsent_bytes);
    each.session->OutputSent(unsent_bytes);
    return as_the_model && unsent_bytes == 0;
  };
  EXPECT_TRUE(Eventually([&] {
    bool all = true;
    for (int64_t rank = 0; rank < scenario_.ranks(); ++rank) all &= matches(rank);
    return all;
  })) << "what the model says does not come";
  for (int64_t rank = 0; rank < scenario_.ranks(); ++rank) {
    if (At(rank).session != nullptr) CheckEnd(rank, At(rank).probe->seen());
  }
  if (!model_.over()) return;
  for (Rank& each : ranks_) each = {};
  over_ = true;
}

void GroupDriver::CheckEnd(int64_t rank, const Seen& seen) {
  SCOPED_TRACE(absl::StrCat("rank ", rank));
  EXPECT_TRUE(seen.faults.empty()) << ::testing::PrintToString(seen.faults);
  const std::optional<absl::StatusCode> failed = model_.failed(rank);
  ASSERT_EQ(seen.failed.has_value(), failed.has_value());
  ASSERT_EQ(seen.finished.has_value(), model_.finished());
  if (failed.has_value()) {
    EXPECT_EQ(seen.failed->code(), *failed) << *seen.failed;
    if (*failed == absl::StatusCode::kAborted && model_.culprit() != rank) {
      EXPECT_TRUE(absl::StrContains(seen.failed->message(), model_.cause())) << *seen.failed;
    }
  } else if (model_.finished()) {
    const auto index = static_cast<size_t>(rank);
    EXPECT_TRUE(testkit::ResultBytes(seen.answer) ==
                testkit::ResultBytes(scenario_.expected[index]));
    EXPECT_EQ(seen.finished->input_bytes,
              static_cast<int64_t>(scenario_.parts[index].total_bytes()));
  }
}

}  // namespace structkv::session
