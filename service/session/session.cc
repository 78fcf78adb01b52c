#include "service/session/session.h"

#include <utility>

#include "service/session/session_core.h"
#include "service/session/session_impl.h"

namespace structkv::session {

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() { impl_->core->Cancel(absl::CancelledError("the session was dropped")); }

const std::string& Session::id() const { return impl_->core->id(); }
const engine::PromptSpec& Session::spec() const { return impl_->core->spec(); }
int64_t Session::reserved_bytes() const { return impl_->core->reserved_bytes(); }
int64_t Session::layers_in_flight() const { return impl_->core->layers_in_flight(); }
transport::Kind Session::transport() const { return impl_->core->transport(); }
const std::string& Session::transport_reason() const { return impl_->core->transport_reason(); }
const transport::ResultPlace& Session::result_place() const { return impl_->core->result_place(); }
Turn Session::turn() const { return impl_->core->turn(); }

void Session::Start(SessionCallbacks callbacks) { impl_->core->Start(std::move(callbacks)); }
void Session::Append(InputMessage message) { impl_->core->Append(std::move(message)); }
void Session::Commit(int64_t layers, int64_t input_bytes) {
  impl_->core->Commit(layers, input_bytes);
}
void Session::EndOfInput() { impl_->core->EndOfInput(); }
void Session::Fail(absl::Status status) { impl_->core->Fail(std::move(status)); }
void Session::OutputSent(int64_t bytes) { impl_->core->OutputSent(bytes); }
void Session::Cancel(absl::Status reason) { impl_->core->Cancel(std::move(reason)); }
void Session::CheckPeers(absl::Duration group_limit) { impl_->core->CheckPeers(group_limit); }

}  // namespace structkv::session
