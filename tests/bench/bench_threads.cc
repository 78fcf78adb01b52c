#include "tests/bench/bench_threads.h"

#include <algorithm>
#include <future>

namespace structkv::bench {

void Threads::Run(absl::FunctionRef<void(ParallelFor)> work) {
  std::promise<void> done;
  scheduler_.Post(lane_, /*small=*/false, [&](ParallelFor parallel) {
    work(parallel);
    done.set_value();
  });
  done.get_future().wait();
}

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace structkv::bench
