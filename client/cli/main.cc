// The structkv command.
//
// Exit status: 0 done, 1 failed, 2 wrong usage or input that cannot be used, 3 no server.
#include <malloc.h>

#include <cstdio>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "client/cli/commands.h"

namespace structkv::cli {
namespace {

int ExitStatus(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kFailedPrecondition:
      return 2;
    case absl::StatusCode::kUnavailable:
      return 3;
    default:
      return 1;
  }
}

int Main(int argc, char** argv) {
  // gRPC is up to three times faster where freed memory stays with the process.
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);

  CLI::App app("Compresses the KV cache of LLM prompts with the StructKV service.", "structkv");
  app.set_version_flag("--version", std::string("structkv ") + STRUCTKV_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(38);
  const Command commands[] = {AddCompress(&app), AddFetch(&app), AddRelease(&app), AddCompare(&app),
                              AddPlot(&app),     AddInfo(&app),  AddBench(&app)};
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  for (const Command& command : commands) {
    if (!command.app->parsed()) continue;
    const absl::Status status = command.run();
    if (!status.ok()) {
      std::fprintf(stderr, "structkv %s: %s: %s\n", command.app->get_name().c_str(),
                   absl::StatusCodeToString(status.code()).c_str(),
                   std::string(status.message()).c_str());
    }
    return ExitStatus(status);
  }
  return 2;
}

}  // namespace
}  // namespace structkv::cli

int main(int argc, char** argv) { return structkv::cli::Main(argc, argv); }
