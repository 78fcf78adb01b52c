#include "error.h"

#include <optional>
#include <string>

#include "absl/time/time.h"
#include "structkv/options.h"

namespace structkv::python {

namespace nb = nanobind;

nb::object ExceptionOf(const absl::Status& status) {
  nb::object retry_after = nb::none();
  if (const std::optional<absl::Duration> wait = client::RetryAfter(status)) {
    retry_after = nb::float_(absl::ToDoubleSeconds(*wait));
  }
  const std::string text(status.message());
  return nb::module_::import_("structkv.errors")
      .attr("of_status")(static_cast<int>(status.code()), nb::str(text.c_str(), text.size()),
                         retry_after);
}

void Throw(const absl::Status& status) {
  const nb::object exception = ExceptionOf(status);
  PyErr_SetObject(exception.type().ptr(), exception.ptr());
  throw nb::python_error();
}

}  // namespace structkv::python
