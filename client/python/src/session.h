// CompressSession for Python.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <utility>

#include "events.h"
#include "interpreter.h"
#include "options.h"
#include "pending.h"
#include "structkv/session.h"

namespace structkv::python {

// A session and what it works with.
class Session : public std::enable_shared_from_this<Session> {
 public:
  // `engine` outlives the session; null: there is none.
  Session(std::unique_ptr<client::CompressSession> session, std::shared_ptr<Events> events,
          std::shared_ptr<const Prompt> prompt, std::shared_ptr<const void> engine)
      : engine_(std::move(engine)),
        prompt_(std::move(prompt)),
        events_(std::move(events)),
        session_(std::move(session)) {}

  void Cancel() { session_->Cancel(); }
  const Prompt& prompt() const { return *prompt_; }
  Events& events() { return *events_; }
  client::CompressSession& session() { return *session_; }
  // Of what is sent.
  const std::shared_ptr<Strand>& strand() const { return strand_; }

 private:
  const std::shared_ptr<const void> engine_;
  const std::shared_ptr<const Prompt> prompt_;
  const std::shared_ptr<Events> events_;
  const std::shared_ptr<Strand> strand_ = std::make_shared<Strand>();
  const std::unique_ptr<client::CompressSession> session_;
};

// What is being sent keeps the session alive; a handle that is dropped cancels it.
using SessionHandle = Held<Session>;

SessionHandle HandleOf(const std::shared_ptr<Session>& session);

void BindSession(nanobind::module_& module);

}  // namespace structkv::python
