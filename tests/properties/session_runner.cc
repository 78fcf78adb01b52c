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

absl::StatusOr<testkit::Answer> RunMessages(SessionManager& manager,
                                            const testkit::PromptData& data,
                                            const SessionRequest& request,
                                            const std::vector<std::vector<PieceBytes>>& messages,
                                            testkit::Random* random) {
  const absl::StatusOr<std::shared_ptr<Session>> session = manager.Open(request);
  if (!session.ok()) return session.status();
  const auto probe = std::make_shared<Probe>();
  (*session)->Start(probe->Callbacks());
  size_t sent = 0;
  bool committed = false;
  while (true) {
    const bool called = probe->WaitFor([&](const Seen& seen) {
      return seen.failed.has_value() || seen.finished.has_value() || seen.unsent_bytes > 0 ||
             (!committed && seen.ready > static_cast<int>(sent));
    });
    if (!called) return absl::InternalError("the session neither asks nor ends");
    Seen seen = probe->seen();
    if (!seen.faults.empty()) return absl::InternalError(absl::StrJoin(seen.faults, "; "));
    if (seen.failed.has_value()) return *seen.failed;
    if (seen.unsent_bytes > 0) {
      probe->Sent(seen.unsent_bytes);
      (*session)->OutputSent(seen.unsent_bytes);
    }
    if (seen.finished.has_value()) return std::move(seen.answer);
    if (committed || seen.ready <= static_cast<int>(sent)) continue;
    if (sent < messages.size()) {
      const auto runs = static_cast<size_t>(random->Between(1, 4));
      (*session)->Append(MessageOf(messages[sent], runs));
      ++sent;
      continue;
    }
    committed = true;
    (*session)->Commit(request.spec.geometry.layers, static_cast<int64_t>(data.total_bytes()));
    (*session)->EndOfInput();
  }
}

}  // namespace structkv::session
