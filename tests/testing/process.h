// Child processes, and what /proc says about a process.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace structkv::testkit {

// A program that runs beside the test. Killed and reaped when destroyed.
class Process {
 public:
  // Starts `arguments[0]`; its standard output and error go into pipes. A server serves its admin
  // pages at any free port, unless told otherwise.
  explicit Process(const std::vector<std::string>& arguments);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int signal) const;
  // Waits for a line that contains `text` on either stream; nullopt at the limit or at the end of
  // both.
  std::optional<std::string> WaitForLine(
      const std::string& text, std::chrono::milliseconds limit = std::chrono::seconds(20));
  // Waits for the end. The exit code, 128 + signal where a signal ended it, or nullopt at the
  // limit.
  std::optional<int> Wait(std::chrono::milliseconds limit = std::chrono::seconds(20));
  // What it wrote so far, after Wait(): everything.
  const std::string& output() const { return output_; }
  const std::string& error() const { return error_; }

 private:
  // Reads what is there, waiting up to `limit`; false once both pipes are closed.
  bool Drain(std::chrono::milliseconds limit);

  pid_t pid_ = -1;
  int out_ = -1;
  int err_ = -1;
  std::string output_;
  std::string error_;
  std::optional<int> code_;
};

// Bytes of `field` ("VmRSS", "VmHWM") in /proc/<pid>/status; 0 where the process is gone.
int64_t StatusBytes(pid_t pid, const std::string& field);
// Open file descriptors; 0 where the process is gone.
int64_t OpenFiles(pid_t pid);

// Polls `condition` until it holds; false at the limit.
bool Eventually(const std::function<bool()>& condition,
                std::chrono::milliseconds limit = std::chrono::seconds(10));

// Names of regions in /dev/shm, whoever's they are: other tests may run beside this one, whose
// names are gone in no time.
std::set<std::string> RegionNames();
// Polls until there is none but those of `before`; false where one stays.
bool NoOtherRegionNames(const std::set<std::string>& before);

// A path in a fresh directory, for a socket or a file; the directory is removed with the object.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  std::string Path(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace structkv::testkit
