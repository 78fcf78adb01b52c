#include "tests/testing/fake_nccl/fake_comm.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

namespace structkv::nccl {
namespace {

using namespace std::chrono_literals;

// Small, so that "half-way" is before the end.
constexpr size_t kMostAtOnce = size_t{256} << 10;

// An abstract name: nothing is left in the file system.
socklen_t Address(const UniqueId& id, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  const size_t length = strnlen(id.bytes, sizeof(address->sun_path) - 1);
  std::memcpy(address->sun_path + 1, id.bytes, length);
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length);
}

std::atomic<void (*)()> begin_access = nullptr;
std::atomic<void (*)()> end_access = nullptr;
std::atomic<void (*)(Stream*)> stream_wait = nullptr;

std::mutex streams_mutex;
std::map<Stream*, int> groups_on;  // streams; how many

void CountGroup(Stream* stream, int more) {
  const std::lock_guard lock(streams_mutex);
  if ((groups_on[stream] += more) == 0) groups_on.erase(stream);
}

// While it lives, the memory of operations can be touched.
class Access {
 public:
  Access() {
    if (void (*const begin)() = begin_access) begin();
  }
  ~Access() {
    if (void (*const end)() = end_access) end();
  }
};

template <class Call>
auto Touch(Call call) {
  const Access access;
  return call();
}

// One direction of a group: each buffer after its length.
class Lane {
 public:
  void Add(const Operation& operation) { operations_.push_back(operation); }
  bool done() const { return next_ == operations_.size(); }
  size_t moved() const { return moved_; }

  // What comes next: the rest of the length, or of the buffer.
  std::pair<std::byte*, size_t> Next() {
    if (at_ < sizeof(length_)) {
      if (at_ == 0) length_ = operations_[next_].bytes;
      return {reinterpret_cast<std::byte*>(&length_) + at_, sizeof(length_) - at_};
    }
    const size_t offset = at_ - sizeof(length_);
    return {operations_[next_].data + offset,
            std::min(operations_[next_].bytes - offset, kMostAtOnce)};
  }
  // False where the length that came is not the buffer's.
  bool Advance(size_t bytes) {
    if (at_ >= sizeof(length_)) moved_ += bytes;
    at_ += bytes;
    if (at_ == sizeof(length_) && length_ != operations_[next_].bytes) return false;
    if (at_ == sizeof(length_) + operations_[next_].bytes) {
      ++next_;
      at_ = 0;
    }
    return true;
  }

 private:
  std::vector<Operation> operations_;
  size_t next_ = 0;
  size_t at_ = 0;  // in length and buffer
  uint64_t length_ = 0;
  size_t moved_ = 0;
};

}  // namespace

void SetAccess(void (*begin)(), void (*end)()) {
  begin_access = begin;
  end_access = end;
}

void SetStreamWait(void (*wait)(Stream*)) { stream_wait = wait; }

bool HasGroups(Stream* stream) {
  const std::lock_guard lock(streams_mutex);
  return groups_on.contains(stream);
}

Fault ParseFault(const std::string& name) {
  if (name.empty()) return Fault::kNone;
  if (name == "never_join") return Fault::kNeverJoin;
  if (name == "die") return Fault::kDie;
  if (name == "hang") return Fault::kHang;
  if (name == "async_error") return Fault::kAsyncError;
  if (name == "slow_abort") return Fault::kSlowAbort;
  std::fprintf(stderr, "fake NCCL: no fault is named '%s'\n", name.c_str());
  std::abort();
}

Comm::Comm(const UniqueId& id, int ranks, int rank, Fault fault)
    : id_(id), ranks_(ranks), rank_(rank), fault_(fault), thread_([this] { Run(); }) {}

Comm::~Comm() {
  thread_.join();
  if (socket_ >= 0) close(socket_);
}

Result Comm::state() { return state_.load(); }

void Comm::Launch(Group group) {
  std::lock_guard lock(mutex_);
  state_ = Result::kInProgress;
  groups_.push_back(std::move(group));
  changed_.notify_one();
}

void Comm::Finalize() {
  std::lock_guard lock(mutex_);
  state_ = Result::kInProgress;
  finalizing_ = true;
  changed_.notify_one();
}

void Comm::RequestAbort() {
  std::lock_guard lock(mutex_);
  aborted_ = true;
  changed_.notify_one();
}

void Comm::CheckThread() const {
  if (std::this_thread::get_id() == user_) return;
  std::fprintf(stderr, "fake NCCL: a communicator is used on another thread\n");
  std::abort();
}

void Comm::Run() {
  if (fault_ == Fault::kNeverJoin) {
    WaitForAbort();
    return;
  }
  if (ranks_ == 2) socket_ = Rendezvous();
  if (aborted()) return;
  state_ = Result::kSuccess;
  for (;;) {
    Group group;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return aborted() || finalizing_ || !groups_.empty(); });
      if (aborted()) return;
      if (groups_.empty()) {
        state_ = Result::kSuccess;  // finalized
        return;
      }
      group = std::move(groups_.front());
      groups_.pop_front();
    }
    std::this_thread::sleep_for(1ms);  // the launch takes its time
    CountGroup(group.stream, 1);
    state_ = Result::kSuccess;
    const bool moved = MoveAll(group);
    CountGroup(group.stream, -1);
    if (!moved) return;
  }
}

bool Comm::MoveAll(const Group& group) {
  if (void (*const wait)(Stream*) = stream_wait) wait(group.stream);
  return ranks_ == 2 ? Move(group) : MoveToSelf(group);
}

int Comm::Rendezvous() {
  sockaddr_un address;
  const socklen_t length = Address(id_, &address);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (rank_ == 1) {
    while (!aborted() && connect(fd, reinterpret_cast<sockaddr*>(&address), length) != 0) {
      std::this_thread::sleep_for(1ms);
    }
    return fd;
  }
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), length) != 0 || listen(fd, 1) != 0) {
    std::perror("fake NCCL: listening");
    std::abort();
  }
  int peer = -1;
  while (!aborted() && peer < 0) {
    pollfd waiting{fd, POLLIN, 0};
    if (poll(&waiting, 1, 5) > 0) {
      peer = accept4(fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    }
  }
  close(fd);
  return peer;
}

bool Comm::Move(const Group& group) {
  Lane out;
  Lane in;
  size_t bytes = 0;
  for (const Operation& operation : group.operations) {
    (operation.send ? out : in).Add(operation);
    bytes += operation.bytes;
  }
  while (!out.done() || !in.done()) {
    if (aborted()) return false;
    if (fault_ != Fault::kNone && out.moved() + in.moved() >= bytes / 2) return Misbehave();
    pollfd ready{socket_,
                 static_cast<int16_t>((out.done() ? 0 : POLLOUT) | (in.done() ? 0 : POLLIN)), 0};
    if (poll(&ready, 1, 5) <= 0) continue;
    if ((ready.revents & POLLOUT) != 0) {
      const auto [data, most] = out.Next();
      const ssize_t sent = Touch([&] { return send(socket_, data, most, MSG_NOSIGNAL); });
      if (sent < 0 && errno != EAGAIN) return WaitForAbort();  // the peer is gone
      if (sent > 0) out.Advance(static_cast<size_t>(sent));
    }
    if ((ready.revents & (POLLIN | POLLHUP)) != 0 && !in.done()) {
      const auto [data, most] = in.Next();
      const ssize_t received = Touch([&] { return recv(socket_, data, most, 0); });
      if (received == 0 || (received < 0 && errno != EAGAIN)) return WaitForAbort();
      if (received > 0 && !in.Advance(static_cast<size_t>(received))) {
        state_ = Result::kInvalidUsage;  // the two ends disagree
        return WaitForAbort();
      }
    }
  }
  return true;
}

bool Comm::MoveToSelf(const Group& group) {
  std::deque<Operation> sends;
  for (const Operation& operation : group.operations) {
    if (operation.send) sends.push_back(operation);
  }
  for (const Operation& operation : group.operations) {
    if (operation.send) continue;
    if (sends.empty() || sends.front().bytes != operation.bytes) {
      state_ = Result::kInvalidUsage;
      return WaitForAbort();
    }
    Touch([&] { return std::memcpy(operation.data, sends.front().data, operation.bytes); });
    sends.pop_front();
  }
  return true;
}

bool Comm::WaitForAbort() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return aborted(); });
  return false;
}

bool Comm::Misbehave() {
  if (fault_ == Fault::kDie) _exit(9);
  if (fault_ == Fault::kAsyncError) state_ = Result::kRemoteError;
  return WaitForAbort();
}

}  // namespace structkv::nccl
