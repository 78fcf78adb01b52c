// What the GPU's benchmarks measure with.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tests/gpu/device_data.h"

namespace structkv::gpu {

// One measured step of a layer. The floor is the time in which its bytes move at the copy's rate.
struct Row {
  std::string step;
  int64_t tokens = 0;
  double bytes = 0;
  double micros = 0;
  double bar_micros = 0;  // 0: none
};

class Events {
 public:
  Events() {
    OrDie(cudaEventCreate(&begin_), "cudaEventCreate");
    OrDie(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~Events() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;

  // Microseconds of a call of `work`, the median of the rounds.
  double Median(const std::function<void()>& work) {
    std::vector<float> millis;
    for (int i = 0; i < kWarmUp + kRounds; ++i) {
      OrDie(cudaEventRecord(begin_), "cudaEventRecord");
      work();
      OrDie(cudaEventRecord(end_), "cudaEventRecord");
      OrDie(cudaEventSynchronize(end_), "cudaEventSynchronize");
      float elapsed = 0;
      OrDie(cudaEventElapsedTime(&elapsed, begin_, end_), "cudaEventElapsedTime");
      if (i >= kWarmUp) millis.push_back(elapsed);
    }
    std::sort(millis.begin(), millis.end());
    return 1e3 * static_cast<double>(millis[millis.size() / 2]);
  }

 private:
  static constexpr int kRounds = 20;
  static constexpr int kWarmUp = 3;

  cudaEvent_t begin_;
  cudaEvent_t end_;
};

// Bytes a second of a copy within the device, read and written.
inline double CopyBytesPerSecond(Events* events) {
  constexpr size_t kBytes = size_t{1} << 30;
  const DeviceBytes from(kBytes);
  const DeviceBytes to(kBytes);
  const double micros = events->Median([&] {
    OrDie(cudaMemcpyAsync(to.as<void>(), from.as<void>(), kBytes, cudaMemcpyDeviceToDevice),
          "cudaMemcpyAsync");
  });
  return 2.0 * static_cast<double>(kBytes) / (micros * 1e-6);
}

}  // namespace structkv::gpu
