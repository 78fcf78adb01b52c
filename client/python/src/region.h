// Memory that is shared with a server: Region and Arena for Python.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>

#include "interpreter.h"
#include "structkv/arena.h"
#include "structkv/region.h"

namespace structkv::python {

using RegionHandle = Held<client::Region>;
using ArenaHandle = Held<client::Arena>;

// A cudaStream_t as the integer that Python has of it; nullopt of None. Throws InvalidArgument with
// the name.
std::optional<void*> StreamOf(nanobind::handle stream, const char* name);

void BindRegion(nanobind::module_& module);

}  // namespace structkv::python
