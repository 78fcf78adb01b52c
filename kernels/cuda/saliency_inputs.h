// The inputs of a saliency call in a lease's memory.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/saliency_plan.h"
#include "kernels/cuda/staging.h"

namespace structkv::cuda {

// Keys are packed, so that they are aligned as the kernels want them whatever the caller's are,
// unless they lie in the device's memory so that the kernels can read them there. Refers to what
// `params` point to.
class SaliencyInputs {
 public:
  // Adds the inputs and the workspace to `parts`. `keys_at`: where the keys lie.
  SaliencyInputs(const SaliencyParams& params, const Place& keys_at, Parts* parts);

  // Queues the copies.
  void Write(const Lease& lease, Upload* upload) const;
  // The call, with its inputs and workspace in the lease; flags and outputs are still to be set.
  SaliencyRequest In(const Lease& lease) const;

 private:
  const SaliencyParams params_;
  const bool in_place_;
  SaliencyRequest request_;  // its pointers are still the caller's
  int64_t queries_, keys_, table_, lse_, key_scales_, workspace_;
};

// INVALID_ARGUMENT, as Backend::Saliency describes it, where something was found.
absl::Status StatusOf(const SaliencyFlags& flags, const SaliencyParams& params, BadStatistic* bad);

}  // namespace structkv::cuda
