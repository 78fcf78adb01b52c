// What whoever watches a backend is told of its GPUs.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace structkv {

struct BackendStats {
  // Memory that was taken at the start, in bytes, and what of it is in use.
  struct Pool {
    int64_t bytes = 0;
    int64_t used_bytes = 0;
  };
  struct Gpu {
    int index = 0;  // CUDA's
    Pool calls;     // what operations take for themselves
    Pool resident;  // what Backend::Resident gives
    Pool apart;     // what Backend::Reserve gives
  };
  std::vector<Gpu> gpus;
  // Allocations of other processes that are open (Backend::Import).
  int64_t open_imports = 0;
  // Calls of this process that failed since its start, by CUDA's name of the error.
  std::map<std::string, int64_t> errors;
};

}  // namespace structkv
