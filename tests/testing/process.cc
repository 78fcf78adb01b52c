#include "tests/testing/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

extern char** environ;

namespace structkv::testkit {
namespace {

using Clock = std::chrono::steady_clock;

std::chrono::milliseconds Left(Clock::time_point end) {
  return std::max(std::chrono::milliseconds(0),
                  std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()));
}

// Appends what can be read; closes and resets `fd` at the end of the pipe.
void ReadSome(int* fd, std::string* to) {
  char buffer[4096];
  const ssize_t count = read(*fd, buffer, sizeof(buffer));
  if (count > 0) {
    to->append(buffer, static_cast<size_t>(count));
  } else if (count == 0) {
    close(*fd);
    *fd = -1;
  }
}

std::optional<std::string> FindLine(const std::string& all, const std::string& text) {
  const size_t at = all.find(text);
  if (at == std::string::npos) return std::nullopt;
  const size_t end = all.find('\n', at);
  if (end == std::string::npos) return std::nullopt;
  const size_t before = all.rfind('\n', at);
  const size_t begin = before == std::string::npos ? 0 : before + 1;
  return all.substr(begin, end - begin);
}

}  // namespace

Process::Process(const std::vector<std::string>& arguments) {
  int out[2];
  int err[2];
  if (pipe2(out, O_CLOEXEC) != 0) return;
  if (pipe2(err, O_CLOEXEC) != 0) {
    close(out[0]);
    close(out[1]);
    return;
  }
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, out[1], 1);
  posix_spawn_file_actions_adddup2(&actions, err[1], 2);
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  // Servers run side by side: one admin port cannot be all of theirs.
  setenv("STRUCTKV_ADMIN_LISTEN", "127.0.0.1:0", /*overwrite=*/0);
  if (posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ) != 0) pid_ = -1;
  posix_spawn_file_actions_destroy(&actions);
  close(out[1]);
  close(err[1]);
  out_ = out[0];
  err_ = err[0];
}

Process::~Process() {
  if (pid_ > 0 && !code_) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  if (out_ >= 0) close(out_);
  if (err_ >= 0) close(err_);
}

void Process::Signal(int signal) const {
  if (pid_ > 0 && !code_) kill(pid_, signal);
}

bool Process::Drain(std::chrono::milliseconds limit) {
  pollfd fds[2] = {{out_, POLLIN, 0}, {err_, POLLIN, 0}};
  if (out_ < 0 && err_ < 0) return false;
  if (poll(fds, 2, static_cast<int>(limit.count())) <= 0) return true;
  if (fds[0].revents != 0) ReadSome(&out_, &output_);
  if (fds[1].revents != 0) ReadSome(&err_, &error_);
  return true;
}

std::optional<std::string> Process::WaitForLine(const std::string& text,
                                                std::chrono::milliseconds limit) {
  const Clock::time_point end = Clock::now() + limit;
  for (;;) {
    if (auto line = FindLine(output_, text)) return line;
    if (auto line = FindLine(error_, text)) return line;
    if (Clock::now() >= end || !Drain(Left(end))) return std::nullopt;
  }
}

std::optional<int> Process::Wait(std::chrono::milliseconds limit) {
  const Clock::time_point end = Clock::now() + limit;
  while (!code_ && pid_ > 0) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    } else if (Clock::now() >= end) {
      return std::nullopt;
    } else if (!Drain(std::chrono::milliseconds(10))) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
  while ((out_ >= 0 || err_ >= 0) && Clock::now() < end) Drain(Left(end));
  return code_;
}

int64_t StatusBytes(pid_t pid, const std::string& field) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/status");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind(field + ":", 0) == 0) {
      return std::strtoll(line.c_str() + field.size() + 1, nullptr, 10) * 1024;
    }
  }
  return 0;
}

int64_t OpenFiles(pid_t pid) {
  std::error_code error;
  int64_t count = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/fd", error)) {
    static_cast<void>(entry);
    ++count;
  }
  return count;
}

bool Eventually(const std::function<bool()>& condition, std::chrono::milliseconds limit) {
  const Clock::time_point end = Clock::now() + limit;
  while (!condition()) {
    if (Clock::now() >= end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

std::set<std::string> RegionNames() {
  std::set<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator("/dev/shm")) {
    const std::string name = file.path().filename().string();
    if (name.rfind("structkv.", 0) == 0) names.insert(name);
  }
  return names;
}

bool NoOtherRegionNames(const std::set<std::string>& before) {
  return Eventually([&before] {
    const std::set<std::string> now = RegionNames();
    return std::includes(before.begin(), before.end(), now.begin(), now.end());
  });
}

TemporaryDirectory::TemporaryDirectory() {
  std::string path = (std::filesystem::temp_directory_path() / "structkv-XXXXXX").string();
  if (mkdtemp(path.data()) != nullptr) path_ = path;
}

TemporaryDirectory::~TemporaryDirectory() {
  if (path_.empty()) return;
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

}  // namespace structkv::testkit
