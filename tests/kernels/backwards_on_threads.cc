#include <atomic>
#include <thread>

#include "tests/kernels/backends_under_test.h"

namespace structkv::testing {

void BackwardsOnThreads(int64_t count, absl::FunctionRef<void(int64_t)> task) {
  std::atomic<int64_t> next{count - 1};
  const auto work = [&] {
    for (int64_t i = next--; i >= 0; i = next--) task(i);
  };
  std::thread first(work);
  std::thread second(work);
  work();
  first.join();
  second.join();
}

}  // namespace structkv::testing
