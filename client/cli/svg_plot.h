// The picture of a compacted cache.
#pragma once

#include <string>

#include "client/cli/plot_data.h"

namespace structkv::cli {

// A self-contained SVG document: a panel for each metric over the layers, with the pivot marked,
// and a map of the tokens that each layer kept. Readable on light and on dark ground.
std::string RenderPlot(const PlotData& data);

}  // namespace structkv::cli
