// Runs the `structkv` command as a user does: as a process.
#pragma once

#include <sys/wait.h>

#include <cstdio>
#include <string>

#include "gtest/gtest.h"
#include "tests/testing/process.h"

namespace structkv::cli {

struct Ran {
  int code = -1;
  std::string output;  // standard output and error
};

inline Ran RunCommand(const std::string& arguments) {
  Ran ran;
  FILE* pipe = popen((STRUCTKV_COMMAND " " + arguments + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return ran;
  char buffer[4096];
  for (size_t n = 0; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) {
    ran.output.append(buffer, n);
  }
  const int status = pclose(pipe);
  ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return ran;
}

class CommandTest : public ::testing::Test {
 protected:
  testkit::TemporaryDirectory directory_;
};

}  // namespace structkv::cli
