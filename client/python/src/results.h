// What comes back, as objects of structkv/results.py.
#pragma once

#include <nanobind/nanobind.h>

#include "structkv/held_cache.h"
#include "structkv/result.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::python {

nanobind::object FromLayer(const client::LayerResult& layer, const v1::Open& open,
                           const v1::Opened& opened);
nanobind::object FromEvent(client::Event event, const v1::Open& open, const v1::Opened& opened);
nanobind::object FromPull(const client::RowPull& pull, const v1::Open& open,
                          const v1::Opened& opened);
nanobind::object FromFetched(const client::FetchedCache& fetched);

}  // namespace structkv::python
