// Threads as a server gives them to a layer.
#pragma once

#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/backend.h"
#include "service/engine/scheduler.h"

namespace structkv::bench {

// Runs `work` with the ParallelFor that a server with so many threads gives to a layer.
class Threads {
 public:
  explicit Threads(int threads) : scheduler_(threads), lane_(scheduler_.NewLane()) {}

  void Run(absl::FunctionRef<void(ParallelFor)> work);

 private:
  engine::Scheduler scheduler_;
  std::shared_ptr<engine::Scheduler::Lane> lane_;
};

// So that a run that something else on the machine held up does not count.
double Median(std::vector<double> values);

}  // namespace structkv::bench
