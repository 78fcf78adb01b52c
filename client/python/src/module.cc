// The extension module structkv._core: what structkv's Python is written on.
#include <nanobind/nanobind.h>

#include "client.h"
#include "interpreter.h"
#include "pending.h"
#include "region.h"
#include "session.h"
#include "tensor.h"

NB_MODULE(_core, module) {
  namespace py = structkv::python;
  // At the interpreter's end a daemon thread keeps whatever it has.
  nanobind::set_leak_warnings(false);
  module.attr("__doc__") = "The C++ client of StructKV, as structkv uses it.";
  py::BindPending(module);
  py::BindTensor(module);
  py::BindRegion(module);
  py::BindSession(module);
  py::BindClient(module);
  py::BindEngine(module);
  module.def("stop", &py::StopInterpreting,
             "The interpreter's end: no thread of the library enters it any more.");
  module.attr("version") = STRUCTKV_VERSION;
}
