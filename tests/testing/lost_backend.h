// What a process must do whose backend is lost.
#pragma once

#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "service/server.h"

namespace structkv::testkit {

// Fails the test unless ServeUntilEnd, while `lose` runs on a thread of its own, returns within
// five seconds, at once and with exit code 1, and has logged a line that names `cause`. `signals`:
// what it waits for.
void ExpectEndsAsLost(Server* server, absl::FunctionRef<void()> lose, const std::string& cause,
                      const std::vector<int>& signals = {});

}  // namespace structkv::testkit
