// Memory that is shared with a server: Region and Arena for Python.
#pragma once

#include <nanobind/nanobind.h>

#include "interpreter.h"
#include "structkv/arena.h"
#include "structkv/region.h"

namespace structkv::python {

using RegionHandle = Held<client::Region>;
using ArenaHandle = Held<client::Arena>;

void BindRegion(nanobind::module_& module);

}  // namespace structkv::python
