// One communicator of the fake NCCL: a thread that stands for the GPU, and a unix socket for the
// wire.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "service/transport/nccl/nccl_abi.h"

namespace structkv::nccl {

// Whether groups are on a stream, which may be another runtime's.
bool HasGroups(Stream* stream);

// What goes wrong with a communicator, half-way through its first group where it is of a transfer.
enum class Fault {
  kNone,
  kNeverJoin,   // never comes to the rendezvous
  kDie,         // the process ends, as by a crash
  kHang,        // nothing moves any more, and nothing is said
  kAsyncError,  // ncclCommGetAsyncError says ncclRemoteError
  kSlowAbort,   // as kHang, and ncclCommAbort returns late
};
// "", "never_join", "die", "hang", "async_error", "slow_abort"; aborts the program for others.
Fault ParseFault(const std::string& name);

// What is called around each touch of the memory of operations; null: nothing.
void SetAccess(void (*begin)(), void (*end)());
// What waits for what a stream has before a group; null: streams have nothing else.
void SetStreamWait(void (*wait)(Stream*));

struct Operation {
  bool send = false;
  std::byte* data = nullptr;
  size_t bytes = 0;
  int peer = 0;
};

struct Group {
  std::vector<Operation> operations;
  Stream* stream = nullptr;
};

// As cruel as NCCL may be: a group is on its stream only some time after ncclGroupEnd; a peer that
// is gone is never noticed; another thread that uses a communicator aborts the program.
struct Comm {
  Comm(const UniqueId& id, int ranks, int rank, Fault fault);
  // Waits for the thread: RequestAbort first, or after Finalize has succeeded.
  ~Comm();

  Result state();
  void Launch(Group group);
  void Finalize();
  void RequestAbort();
  void CheckThread() const;

  int ranks() const { return ranks_; }
  Fault fault() const { return fault_; }

 private:
  void Run();
  int Rendezvous();
  // False where it was aborted.
  bool Move(const Group& group);
  bool MoveToSelf(const Group& group);
  bool MoveAll(const Group& group);
  bool WaitForAbort();
  bool Misbehave();
  bool aborted() const { return aborted_.load(); }

  const UniqueId id_;
  const int ranks_;
  const int rank_;
  const Fault fault_;
  const std::thread::id user_ = std::this_thread::get_id();
  std::atomic<bool> aborted_ = false;
  std::atomic<Result> state_ = Result::kInProgress;
  int socket_ = -1;  // the thread's

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Group> groups_;
  bool finalizing_ = false;

  std::thread thread_;
};

}  // namespace structkv::nccl
