// What a Session handle holds. For session.cc and session_manager.cc alone.
#pragma once

#include <memory>

#include "service/session/session.h"
#include "service/session/session_core.h"

namespace structkv::session {

class Session::Impl {
 public:
  std::shared_ptr<SessionCore> core;
};

}  // namespace structkv::session
