// The few types and values of NCCL's C interface that are used here, so that hosts without its
// header build too. tests/transport/nccl_abi_test.cc compares them with nccl.h where there is one.
#pragma once

#include <climits>
#include <cstddef>

namespace structkv::nccl {

// An opaque `ncclComm`, and what `cudaStream_t` points to.
struct Comm;
struct Stream;

// `ncclUniqueId`: what the two ends of a communicator find each other by.
struct UniqueId {
  char bytes[128] = {};
};

// `ncclResult_t`.
enum class Result : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

// `ncclDataType_t`'s ncclUint8: everything travels as bytes.
inline constexpr int kBytes = 1;

// `ncclConfig_t` as of NCCL 2.18; newer libraries take it with their defaults for the rest.
struct Config {
  size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = 21800;
  int blocking = INT_MIN;
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};

// The functions that are used, as nccl.h declares them.
struct Functions {
  Result (*get_version)(int* version);
  Result (*get_unique_id)(UniqueId* id);
  Result (*comm_init_rank_config)(Comm** comm, int ranks, UniqueId id, int rank, Config* config);
  Result (*comm_finalize)(Comm* comm);
  Result (*comm_destroy)(Comm* comm);
  Result (*comm_abort)(Comm* comm);
  Result (*comm_get_async_error)(Comm* comm, Result* error);
  const char* (*get_error_string)(Result result);
  const char* (*get_last_error)(Comm* comm);
  Result (*send)(const void* data, size_t count, int type, int peer, Comm* comm, Stream* stream);
  Result (*receive)(void* data, size_t count, int type, int peer, Comm* comm, Stream* stream);
  Result (*group_start)();
  Result (*group_end)();
};

}  // namespace structkv::nccl
