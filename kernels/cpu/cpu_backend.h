// The fast backend of a host: SIMD, the best instruction set of the machine.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace structkv::cpu {

struct CpuOptions {
  // Instruction set, one of CpuTargets(). Empty: the environment variable STRUCTKV_CPU_TARGET, and
  // where that is empty too the best.
  std::string_view target;
};

// Instruction sets that this build has and this machine can run, best first, for instance
// "avx3_bf16", "avx3", "avx2", "sse4", "baseline".
std::vector<std::string_view> CpuTargets();

// NOT_FOUND, with the known names, for an unknown target.
absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuOptions& options = {});

}  // namespace structkv::cpu
