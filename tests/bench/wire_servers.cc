#include "tests/bench/wire_servers.h"

#include <optional>

#include "tests/bench/wire_peer.h"

namespace structkv::bench {
namespace {

constexpr char kAnyPort[] = "127.0.0.1:0";

// The TCP address in the line that says "ready".
std::string TcpAddress(testkit::Process* process, const std::string& name) {
  const std::optional<std::string> line = process->WaitForLine("ready");
  if (!line.has_value()) Die(name + " does not start: " + process->error());
  const size_t at = line->find("127.0.0.1:");
  if (at == std::string::npos) Die(name + " does not say its port: " + *line);
  return line->substr(at, line->find_first_of(", ", at) - at);
}

}  // namespace

Servers::Servers(const std::string& self, const std::string& server, const std::string& backend)
    : bare_({self, "--serve-bare", std::string(kAnyPort) + "," + bare_unix()}),
      server_({server, "--listen", kAnyPort, "--listen", unix_socket(), "--max-message", "64MiB",
               "--memory-budget", "8GiB", "--hold-budget", "8GiB", "--region-socket",
               directory_.Path("regions"), "--backend", backend, "--log-sessions", "false"}),
      bare_tcp_(TcpAddress(&bare_, "the bare server")),
      tcp_(TcpAddress(&server_, "structkv-server")) {}

}  // namespace structkv::bench
