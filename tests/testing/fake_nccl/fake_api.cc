// The exported functions: NCCL's, as far as they are used, a stand-in for CUDA's streams, and what
// tests command. See fake_nccl.h.
#include <sys/random.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/testing/fake_nccl/fake_comm.h"

namespace structkv::nccl {
namespace {

std::string Environment(const char* name, const char* otherwise) {
  const char* const value = std::getenv(name);
  return value != nullptr ? value : otherwise;
}

std::mutex next_fault_mutex;
std::string next_fault;

Fault TakeFault(int rank) {
  std::lock_guard lock(next_fault_mutex);
  const size_t at = next_fault.find('@');
  if (at != std::string::npos && std::stoi(next_fault.substr(at + 1)) != rank) return Fault::kNone;
  const std::string fault = std::exchange(next_fault, "").substr(0, at);
  return ParseFault(fault.empty() ? Environment("FAKE_NCCL_FAULT", "") : fault);
}

std::atomic<int> live_comms = 0;
std::atomic<int> live_streams = 0;
std::atomic<int> largest_abort = 0;

thread_local int group_depth = 0;
thread_local std::vector<std::pair<Comm*, Group>> group;
thread_local std::vector<Comm*> aborted_group;

Result Add(const Operation& operation, int type, Comm* comm, Stream* stream) {
  comm->CheckThread();
  if (type != kBytes || operation.peer < 0 || operation.peer >= comm->ranks()) {
    return Result::kInvalidArgument;
  }
  if (group_depth == 0 || comm->state() != Result::kSuccess) return Result::kInvalidUsage;
  if (group.empty() || group.back().first != comm) group.push_back({comm, {{}, stream}});
  group.back().second.operations.push_back(operation);
  return Result::kSuccess;
}

// All are told before the first is waited for, which is what a group is for.
void AbortAll(std::vector<Comm*> comms) {
  bool slow = false;
  for (Comm* comm : comms) {
    slow = slow || comm->fault() == Fault::kSlowAbort;
    comm->RequestAbort();
  }
  if (slow) {
    std::this_thread::sleep_for(
        std::chrono::milliseconds(std::stoi(Environment("FAKE_NCCL_ABORT_MILLIS", "4000"))));
  }
  for (Comm* comm : comms) delete comm;
  live_comms -= static_cast<int>(comms.size());
  int largest = largest_abort;
  while (largest < static_cast<int>(comms.size()) &&
         !largest_abort.compare_exchange_weak(largest, static_cast<int>(comms.size()))) {
  }
}

}  // namespace
}  // namespace structkv::nccl

using structkv::nccl::Comm;
using structkv::nccl::Config;
using structkv::nccl::Result;
using structkv::nccl::Stream;
using structkv::nccl::UniqueId;
namespace fake = structkv::nccl;

#pragma GCC visibility push(default)
extern "C" {

Result ncclGetVersion(int* version) {
  *version = std::stoi(fake::Environment("FAKE_NCCL_VERSION", "22809"));
  return Result::kSuccess;
}

Result ncclGetUniqueId(UniqueId* id) {
  unsigned char random[16];
  if (getrandom(random, sizeof(random), 0) != sizeof(random)) return Result::kSystemError;
  *id = {};
  char* at = id->bytes + std::snprintf(id->bytes, sizeof(id->bytes), "fake-nccl-");
  for (unsigned char byte : random) at += std::snprintf(at, 3, "%02x", byte);
  return Result::kSuccess;
}

Result ncclCommInitRankConfig(Comm** comm, int ranks, UniqueId id, int rank, Config* config) {
  if (config->magic != 0xcafebeef || config->blocking != 0 || ranks < 1 || ranks > 2 || rank < 0 ||
      rank >= ranks) {
    return Result::kInvalidArgument;
  }
  ++fake::live_comms;
  *comm = new Comm(id, ranks, rank, fake::TakeFault(rank));
  return Result::kInProgress;
}

Result ncclCommFinalize(Comm* comm) {
  comm->CheckThread();
  comm->Finalize();
  return Result::kInProgress;
}

Result ncclCommDestroy(Comm* comm) {
  delete comm;
  --fake::live_comms;
  return Result::kSuccess;
}

Result ncclCommAbort(Comm* comm) {
  if (fake::group_depth > 0) {
    fake::aborted_group.push_back(comm);
  } else {
    fake::AbortAll({comm});
  }
  return Result::kSuccess;
}

Result ncclCommGetAsyncError(Comm* comm, Result* error) {
  comm->CheckThread();
  *error = comm->state();
  return Result::kSuccess;
}

const char* ncclGetErrorString(Result result) {
  switch (result) {
    case Result::kSuccess:
      return "no error";
    case Result::kInvalidArgument:
      return "invalid argument";
    case Result::kInvalidUsage:
      return "invalid usage";
    case Result::kRemoteError:
      return "remote process exited or there was a network error";
    default:
      return "another error";
  }
}

const char* ncclGetLastError(Comm*) { return "fake NCCL"; }

Result ncclSend(const void* data, size_t count, int type, int peer, Comm* comm, Stream* stream) {
  auto* bytes = static_cast<std::byte*>(const_cast<void*>(data));
  return fake::Add({true, bytes, count, peer}, type, comm, stream);
}

Result ncclRecv(void* data, size_t count, int type, int peer, Comm* comm, Stream* stream) {
  return fake::Add({false, static_cast<std::byte*>(data), count, peer}, type, comm, stream);
}

Result ncclGroupStart() {
  ++fake::group_depth;
  return Result::kSuccess;
}

Result ncclGroupEnd() {
  if (fake::group_depth == 0) return Result::kInvalidUsage;
  if (--fake::group_depth > 0) return Result::kSuccess;
  if (!fake::aborted_group.empty()) fake::AbortAll(std::exchange(fake::aborted_group, {}));
  const bool launched = !fake::group.empty();
  for (auto& [comm, group] : std::exchange(fake::group, {})) comm->Launch(std::move(group));
  return launched ? Result::kInProgress : Result::kSuccess;
}

Stream* fakeStreamCreate() {
  ++fake::live_streams;
  return reinterpret_cast<Stream*>(new char);
}

void fakeStreamDestroy(Stream* stream) {
  delete reinterpret_cast<char*>(stream);
  --fake::live_streams;
}

int fakeStreamDone(Stream* stream) { return HasGroups(stream) ? 0 : 1; }

void fakeNcclSetAccess(void (*begin)(), void (*end)()) { fake::SetAccess(begin, end); }

void fakeNcclSetStreamWait(void (*wait)(Stream*)) { SetStreamWait(wait); }

void fakeNcclFaultNext(const char* fault) {
  std::lock_guard lock(fake::next_fault_mutex);
  fake::next_fault = fault;
}

int fakeNcclLiveComms() { return fake::live_comms; }

int fakeNcclLiveStreams() { return fake::live_streams; }

int fakeNcclLargestAbort() { return fake::largest_abort.exchange(0); }

}  // extern "C"
#pragma GCC visibility pop
