// Client, of a server or of the engine in this process, for Python.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "interpreter.h"
#include "service/server.h"
#include "structkv/client.h"

namespace structkv::python {

// A client and, where it is in this process, what it talks to.
struct Connection {
  // Ends the engine, where there is one; what runs in it, and what comes, fails as UNAVAILABLE.
  void Close() {
    if (engine != nullptr) engine->Shutdown();
  }

  std::shared_ptr<Server> engine;  // null: none
  std::unique_ptr<client::Client> client;
};

using ConnectionHandle = Held<Connection>;

void BindClient(nanobind::module_& module);
void BindEngine(nanobind::module_& module);

}  // namespace structkv::python
