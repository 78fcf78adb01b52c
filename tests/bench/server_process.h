// The server as a process of its own, and what the system says of its memory and time.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tests/testing/process.h"

namespace structkv::bench {

// User and system time of all threads of a process so far.
double ProcessCpuSeconds(pid_t pid);

class ServerProcess {
 public:
  // Listens on a unix socket of its own. Ends the program where the server does not start.
  ServerProcess(const std::string& program, const std::vector<std::string>& flags);

  const std::string& address() const { return address_; }
  int64_t resident_bytes() const;       // now
  int64_t peak_resident_bytes() const;  // ever
  double cpu_seconds() const { return ProcessCpuSeconds(process_.pid()); }

 private:
  const testkit::TemporaryDirectory directory_;
  const std::string address_;
  testkit::Process process_;
};

}  // namespace structkv::bench
