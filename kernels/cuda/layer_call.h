// A layer on a GPU without a stop in between.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "kernels/cuda/devices.h"
#include "kernels/layer_pass.h"

namespace structkv::cuda {

// As Backend::RunLayer, in one lease: queries and keys go to the device unless they are there, and
// everything between them and the outputs stays. Rows are gathered where the device can read their
// source: its own or pinned memory, or keys that were copied for their saliency; `left` gets the
// others, whose positions the caller then has. UNIMPLEMENTED where a device cannot hold it all.
absl::Status RunLayer(Devices& devices, const LayerPass& pass, BadStatistic* bad,
                      std::vector<const LayerPass::Rows*>* left);

}  // namespace structkv::cuda
