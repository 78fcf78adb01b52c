#include <cstdio>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "client/cli/commands.h"
#include "client/cli/output_file.h"
#include "client/cli/plot_data.h"
#include "client/cli/safetensors.h"
#include "client/cli/svg_plot.h"
#include "nlohmann/json.hpp"

namespace structkv::cli {
namespace {

struct PlotFlags {
  std::string input;
  std::string output;
  bool json = false;
};

absl::Status RunPlot(const PlotFlags& flags) {
  if (absl::Status status = CheckNotInput(flags.output, flags.input); !status.ok()) return status;
  absl::StatusOr<std::shared_ptr<const SafetensorsFile>> file = SafetensorsFile::Open(flags.input);
  if (!file.ok()) return file.status();
  absl::StatusOr<PlotData> data = ReadPlotData(**file);
  if (!data.ok()) return data.status();
  const std::string svg = RenderPlot(*data);
  if (absl::Status status = WriteFile(flags.output, svg); !status.ok()) return status;
  if (flags.json) {
    const nlohmann::ordered_json json = {
        {"input", flags.input}, {"output", flags.output}, {"bytes", svg.size()}};
    std::printf("%s\n", json.dump(2).c_str());
  } else {
    std::printf("plot      %s\n", flags.output.c_str());
  }
  return absl::OkStatus();
}

}  // namespace

Command AddPlot(CLI::App* app) {
  auto flags = std::make_shared<PlotFlags>();
  CLI::App* sub = app->add_subcommand(
      "plot", "Draw a compacted cache: metrics, pivot, and the tokens that each layer kept");
  sub->add_option("input", flags->input, "Compacted cache (safetensors)")->required();
  sub->add_option("--out,-o", flags->output, "Picture to write (SVG)")->required();
  sub->add_flag("--json", flags->json, "Print JSON");
  return {sub, [flags] { return RunPlot(*flags); }};
}

}  // namespace structkv::cli
