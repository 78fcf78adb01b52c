#include "tests/properties/session_runner.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_join.h"

namespace structkv::session {
namespace {

// Where the pieces of a tensor end.
std::vector<int64_t> Ends(int64_t size, testkit::Random* random) {
  std::vector<int64_t> ends = {size};
  const int64_t cuts = random->Chance(30) ? 0 : random->Between(1, 6);
  for (int64_t i = 0; i < cuts; ++i) {
    const int64_t at = random->Between(1, size);
    ends.push_back(at);
    if (random->Chance(20)) ends.push_back(std::min(size, at + 1));
  }
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  return ends;
}

template <typename T>
void Shuffle(std::vector<T>* values, testkit::Random* random) {
  for (size_t i = values->size(); i > 1; --i) {
    std::swap((*values)[i - 1],
              (*values)[static_cast<size_t>(random->Between(0, static_cast<int64_t>(i) - 1))]);
  }
}

// One session, and what it is still to be sent.
class Runner {
 public:
  Runner(std::shared_ptr<Session> session, const SessionInput& input)
      : session_(std::move(session)), input_(input) {
    session_->Start(probe_->Callbacks());
  }

  // Does one thing that a good client would do now; false where there is none.
  bool Step(testkit::Random* random) {
    int64_t unsent_bytes = 0;
    bool asked = false;
    probe_->Is([&](const Seen& seen) {
      unsent_bytes = seen.unsent_bytes;
      return asked = !Over(seen) && seen.ready > static_cast<int>(sent_);
    });
    if (unsent_bytes > 0) {
      probe_->Sent(unsent_bytes);
      session_->OutputSent(unsent_bytes);
      return true;
    }
    if (!asked || committed_) return false;
    if (sent_ < input_.messages.size()) {
      session_->Append(
          MessageOf(input_.messages[sent_++], static_cast<size_t>(random->Between(1, 4))));
      return true;
    }
    committed_ = true;
    session_->Commit(input_.request.spec.geometry.layers,
                     static_cast<int64_t>(input_.data->total_bytes()));
    session_->EndOfInput();
    return true;
  }

  bool over() const { return probe_->Is(Over); }

  absl::StatusOr<testkit::Answer> Result() const {
    Seen seen = probe_->seen();
    if (!seen.faults.empty()) return absl::InternalError(absl::StrJoin(seen.faults, "; "));
    if (seen.failed.has_value()) return *seen.failed;
    return std::move(seen.answer);
  }

 private:
  static bool Over(const Seen& seen) {
    return seen.failed.has_value() || seen.finished.has_value();
  }

  const std::shared_ptr<Probe> probe_ = std::make_shared<Probe>();
  const std::shared_ptr<Session> session_;
  const SessionInput& input_;
  size_t sent_ = 0;
  bool committed_ = false;
};

}  // namespace

std::vector<std::vector<PieceBytes>> RandomMessages(const testkit::PromptData& data,
                                                    const engine::PromptSpec& spec,
                                                    testkit::Random* random) {
  std::vector<PieceBytes> pieces;
  for (int64_t layer = 0; layer < spec.geometry.layers; ++layer) {
    if (!spec.has_input(layer)) continue;
    for (const engine::InputTensor tensor : spec.RequiredTensors()) {
      int64_t begin = 0;
      for (const int64_t end : Ends(spec.InputBytes(tensor), random)) {
        pieces.push_back(PieceOf(data, layer, tensor, begin, end - begin));
        begin = end;
      }
    }
  }
  Shuffle(&pieces, random);
  std::vector<std::vector<PieceBytes>> messages;
  for (PieceBytes& piece : pieces) {
    if (messages.empty() || random->Chance(40)) messages.emplace_back();
    messages.back().push_back(std::move(piece));
  }
  return messages;
}

absl::StatusOr<std::vector<testkit::Answer>> RunSessions(SessionManager& manager,
                                                         const std::vector<SessionInput>& inputs,
                                                         testkit::Random* random) {
  std::vector<std::unique_ptr<Runner>> runners;
  for (const SessionInput& input : inputs) {
    absl::StatusOr<std::shared_ptr<Session>> session = manager.Open(input.request);
    if (!session.ok()) return session.status();
    runners.push_back(std::make_unique<Runner>(*std::move(session), input));
  }
  std::vector<Runner*> order;
  for (const auto& runner : runners) order.push_back(runner.get());
  const auto step = [&] {  // of any that can do something
    Shuffle(&order, random);
    return std::any_of(order.begin(), order.end(),
                       [&](Runner* runner) { return runner->Step(random); });
  };
  const auto over = [&] {
    return std::all_of(runners.begin(), runners.end(),
                       [](const auto& runner) { return runner->over(); });
  };
  while (!over() || step()) {
    if (!Eventually([&] { return step() || over(); })) {
      return absl::InternalError("the sessions neither ask nor end");
    }
  }
  std::vector<testkit::Answer> answers;
  for (const auto& runner : runners) {
    absl::StatusOr<testkit::Answer> answer = runner->Result();
    if (!answer.ok()) return answer.status();
    answers.push_back(*std::move(answer));
  }
  return answers;
}

}  // namespace structkv::session
