// Arithmetic that is rounded alike on the device and on the host.
#pragma once

#include <cmath>

#include "kernels/cuda/host_device.h"

namespace structkv::cuda {

// a * b + c, rounded once.
STRUCTKV_HOST_DEVICE inline float FusedMultiplyAdd(float a, float b, float c) {
  return fmaf(a, b, c);
}
STRUCTKV_HOST_DEVICE inline double FusedMultiplyAdd(double a, double b, double c) {
  return fma(a, b, c);
}

}  // namespace structkv::cuda
