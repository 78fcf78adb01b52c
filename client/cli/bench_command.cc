#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "client/cli/bench_flags.h"
#include "client/cli/bench_report.h"
#include "client/cli/bench_run.h"
#include "client/cli/bytes_table.h"
#include "client/cli/commands.h"
#include "client/cli/compressor.h"

namespace structkv::cli {
namespace {

absl::Status RunBench(BenchFlags flags) {
  if (flags.bytes) {
    absl::StatusOr<std::string> table = BytesTable(flags.geometry);
    if (table.ok()) std::printf("%s", table->c_str());
    return table.status();
  }
  absl::Status status = CheckBenchFlags(flags);
  if (!status.ok()) return status;
  // No more at a time than there are.
  flags.batch = std::min(flags.batch, flags.prompts);
  flags.concurrency = std::min(flags.concurrency, (flags.prompts + flags.batch - 1) / flags.batch);
  std::vector<std::unique_ptr<Compressor>> compressors;
  for (uint32_t i = 0; i < BenchConnections(flags); ++i) {
    absl::StatusOr<std::unique_ptr<Compressor>> made = MakeCompressor(flags.connection);
    if (!made.ok()) return made.status();
    compressors.push_back(*std::move(made));
  }
  absl::StatusOr<std::vector<BenchPrompt>> prompts = MakeBenchPrompts(flags, *compressors[0]);
  if (!prompts.ok()) return prompts.status();
  BenchFigures figures;
  RunBenchPrompts(flags, compressors, *prompts, &figures);
  if (!figures.status.ok()) return figures.status;
  const auto print = flags.json ? PrintBenchJson : PrintBenchText;
  print(flags, *prompts, compressors[0]->description(), &figures);
  return absl::OkStatus();
}

}  // namespace

Command AddBench(CLI::App* app) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* sub = app->add_subcommand("bench", "Measure with synthetic prompts of any geometry");
  AddBenchFlags(sub, flags.get());
  return {sub, [flags] { return RunBench(*flags); }};
}

}  // namespace structkv::cli
