#include "tests/bench/server_process.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>

namespace structkv::bench {
namespace {

std::vector<std::string> Command(const std::string& program, const std::string& address,
                                 const std::vector<std::string>& flags) {
  std::vector<std::string> command = {program, "--listen", address};
  command.insert(command.end(), flags.begin(), flags.end());
  return command;
}

}  // namespace

ServerProcess::ServerProcess(const std::string& program, const std::vector<std::string>& flags)
    : address_("unix:" + directory_.Path("socket")), process_(Command(program, address_, flags)) {
  if (process_.WaitForLine("ready")) return;
  std::fprintf(stderr, "structkv-server does not start: %s\n", process_.error().c_str());
  std::exit(1);
}

int64_t ServerProcess::resident_bytes() const {
  return testkit::StatusBytes(process_.pid(), "VmRSS");
}

int64_t ServerProcess::peak_resident_bytes() const {
  return testkit::StatusBytes(process_.pid(), "VmHWM");
}

double ProcessCpuSeconds(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  // The name, in parentheses, may hold anything; 11 fields lie between it and utime.
  std::istringstream fields(text.substr(text.rfind(')') + 1));
  std::string skipped;
  for (int i = 0; i < 11; ++i) fields >> skipped;
  double user = 0;
  double system = 0;
  fields >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

}  // namespace structkv::bench
