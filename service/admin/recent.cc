#include "service/admin/recent.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace structkv::admin {
namespace {

template <typename T>
void Push(std::deque<T>* all, T one, size_t most) {
  all->push_front(std::move(one));
  if (all->size() > most) all->pop_back();
}

// The caller's own name for it.
std::string Named(const rpc::CallLabels& call) {
  return call.session_id.empty() ? "" : absl::StrCat(" (", call.session_id, ")");
}

}  // namespace

void Recent::Add(const rpc::PromptReport& prompt, const absl::Status& status) {
  const std::lock_guard lock(mutex_);
  if (prompt.answered > 0) {
    Push(&prompts_, {absl::Now(), prompt, status}, kPrompts);
    prompts_.front().report.timeline = nullptr;  // traces have it
  }
  AddError(absl::StrCat(prompt.id.empty() ? "a prompt at open" : absl::StrCat("prompt ", prompt.id),
                        Named(prompt.call)),
           status);
}

void Recent::Add(const rpc::FetchReport& fetch, const absl::Status& status) {
  const std::lock_guard lock(mutex_);
  AddError(absl::StrCat("a fetch", Named(fetch.call)), status);
}

void Recent::AddError(std::string what, const absl::Status& status) {
  if (!status.ok()) Push(&errors_, {absl::Now(), std::move(what), status}, kErrors);
}

std::vector<Recent::Prompt> Recent::prompts() const {
  const std::lock_guard lock(mutex_);
  return {prompts_.begin(), prompts_.end()};
}

std::vector<Recent::Error> Recent::errors() const {
  const std::lock_guard lock(mutex_);
  return {errors_.begin(), errors_.end()};
}

}  // namespace structkv::admin
