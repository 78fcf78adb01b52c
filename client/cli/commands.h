// The subcommands. Each adds its flags to the application and returns what runs it.
#pragma once

#include <functional>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"

namespace structkv::cli {

struct Command {
  CLI::App* app = nullptr;
  std::function<absl::Status()> run;
};

// compress IN --out OUT: a captured prefill in, a compacted cache out.
Command AddCompress(CLI::App* app);
// fetch HANDLE --to OUT: a cache that compress --hold has left in a server.
Command AddFetch(CLI::App* app);
// release HANDLE: frees it.
Command AddRelease(CLI::App* app);
// info FILE | --server ADDR: what a file is, or what a server can do.
Command AddInfo(CLI::App* app);
// compare IN: what each method keeps, and what that does to attention.
Command AddCompare(CLI::App* app);
// bench: synthetic prompts of any geometry.
Command AddBench(CLI::App* app);
// plot IN --out X.svg: a picture of a compacted cache.
Command AddPlot(CLI::App* app);

}  // namespace structkv::cli
