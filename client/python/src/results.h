// What comes back, as objects of structkv/results.py.
#pragma once

#include <nanobind/nanobind.h>

#include "prompt.h"
#include "structkv/held_cache.h"
#include "structkv/result.h"

namespace structkv::python {

// Tensors are on a GPU where they lie in one of the prompt's regions.
nanobind::object FromLayer(const client::LayerResult& layer, const Prompt& prompt);
nanobind::object FromEvent(client::Event event, const Prompt& prompt);
nanobind::object FromPull(const client::RowPull& pull, const Prompt& prompt);
// `gpu`: the region of FetchOptions.results.
nanobind::object FromFetched(const client::FetchedCache& fetched, const GpuPlaces& gpu);

}  // namespace structkv::python
