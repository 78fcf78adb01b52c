// Prints what `structkv bench` has measured.
#pragma once

#include <string>
#include <vector>

#include "client/cli/bench_flags.h"
#include "client/cli/bench_run.h"

namespace structkv::cli {

// `where`: Compressor::description(). Sorts the figures' times.
void PrintBenchText(const BenchFlags& flags, const std::vector<BenchPrompt>& prompts,
                    const std::string& where, BenchFigures* figures);
void PrintBenchJson(const BenchFlags& flags, const std::vector<BenchPrompt>& prompts,
                    const std::string& where, BenchFigures* figures);

}  // namespace structkv::cli
