// Statuses as exceptions (structkv/errors.py).
#pragma once

#include <nanobind/nanobind.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace structkv::python {

// An instance of the status's class. `status` is not OK.
nanobind::object ExceptionOf(const absl::Status& status);

[[noreturn]] void Throw(const absl::Status& status);

inline void Check(const absl::Status& status) {
  if (!status.ok()) Throw(status);
}

template <typename T>
T Take(absl::StatusOr<T> result) {
  Check(result.status());
  return *std::move(result);
}

}  // namespace structkv::python
