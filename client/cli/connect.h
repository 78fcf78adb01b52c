// The command's connections to a server.
#pragma once

#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "structkv/client.h"

namespace structkv::cli {

// How the server knows who the command is, and the command who the server is. Files are PEM; empty:
// none.
struct SecurityFlags {
  bool tls = false;
  std::string authorities;  // of the server; none: the system's
  std::string certificate;  // of the command's own
  std::string key;
  std::string token_file;  // its first word
};

void AddSecurityFlags(CLI::App* app, SecurityFlags* flags, const char* group);

// A connection of its own. NOT_FOUND for a file that cannot be read, INVALID_ARGUMENT for one
// that is empty, and as Client::Connect.
absl::StatusOr<std::unique_ptr<client::Client>> ConnectTo(const std::string& server,
                                                          const SecurityFlags& flags);

}  // namespace structkv::cli
