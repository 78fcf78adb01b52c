// The two servers that are measured: the bare one and structkv-server, processes of their own.
#pragma once

#include <sys/types.h>

#include <string>

#include "tests/testing/process.h"

namespace structkv::bench {

// Each listens on a TCP port that is free and on a unix socket, until the end of the object. Ends
// the program where one does not start.
class Servers {
 public:
  // `self`: this program. `backend`: structkv-server's.
  Servers(const std::string& self, const std::string& server, const std::string& backend);

  const std::string& bare_tcp() const { return bare_tcp_; }
  const std::string& tcp() const { return tcp_; }
  std::string bare_unix() const { return "unix:" + directory_.Path("bare"); }
  std::string unix_socket() const { return "unix:" + directory_.Path("structkv"); }
  pid_t pid() const { return server_.pid(); }  // of structkv-server

 private:
  testkit::TemporaryDirectory directory_;
  testkit::Process bare_;
  testkit::Process server_;
  std::string bare_tcp_;
  std::string tcp_;
};

}  // namespace structkv::bench
