// What NCCL itself takes between two GPUs of this process, without a service: the floor of prompts
// whose tensors come by NCCL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace structkv::bench {

struct BareNcclOptions {
  std::string cuda_library;  // as RegionOptions.cuda_library
  std::string nccl_library;
  int near = 1;  // the GPU that sends first, and the other one, as CUDA counts them
  int far = 0;
  uint64_t there_bytes = 0;  // of a round trip; 1 or more
  uint64_t back_bytes = 0;
  uint32_t count = 1;
};

// Connects the GPUs, and sends `there_bytes` from one to the other and `back_bytes` back, once to
// warm up and `count` times that are measured: microseconds of each. One ncclSend and one ncclRecv
// a way, by the functions of nccl_api.h, as the transport calls them: a thread for each GPU, a
// non-blocking communicator of as many channels.
absl::StatusOr<std::vector<double>> BareNcclMicros(const BareNcclOptions& options);

}  // namespace structkv::bench
