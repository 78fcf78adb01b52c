// Several servers as processes of their own, for clients that choose between them.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "structkv/replica.h"
#include "tests/testing/process.h"

namespace structkv::testkit {

// A server at a free port of this host.
class ReplicaProcess {
 public:
  // Started, and ready; where it is not, `address` is empty.
  ReplicaProcess(const std::string& program, const std::vector<std::string>& flags)
      : process_(Command(program, flags)) {
    const std::optional<std::string> ready = process_.WaitForLine("ready");
    if (!ready.has_value()) return;
    constexpr char kListen[] = "listen=";
    const size_t begin = ready->find(kListen);
    if (begin == std::string::npos) return;
    const size_t from = begin + sizeof(kListen) - 1;
    address_ = ready->substr(from, ready->find(' ', from) - from);
  }

  Process& process() { return process_; }
  const std::string& address() const { return address_; }

 private:
  static std::vector<std::string> Command(const std::string& program,
                                          const std::vector<std::string>& flags) {
    std::vector<std::string> command = {program, "--listen",       "127.0.0.1:0", "--threads",
                                        "1",     "--log-sessions", "false"};
    command.insert(command.end(), flags.begin(), flags.end());
    return command;
  }

  Process process_;
  std::string address_;
};

// What a name stands for at a time. Thread-safe.
class AddressList {
 public:
  void Set(std::vector<std::string> addresses) {
    absl::MutexLock lock(&mutex_);
    addresses_ = std::move(addresses);
  }
  absl::StatusOr<std::vector<std::string>> Get() const {
    absl::MutexLock lock(&mutex_);
    return addresses_;
  }

 private:
  mutable absl::Mutex mutex_;
  std::vector<std::string> addresses_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::testkit
