// A fixed pool of compute threads that several prompts share fairly.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/functional/any_invocable.h"
#include "kernels/backend.h"

namespace structkv::engine {

// Thread-safe.
class Scheduler {
 public:
  // A layer's computation. It may call the ParallelFor that it is given; the pool's threads then
  // share its tasks with those of other lanes, in turn.
  using Job = absl::AnyInvocable<void(ParallelFor)>;

  // The jobs of one prompt, run one after the other in the order of posting.
  class Lane;

  // threads >= 1.
  explicit Scheduler(int threads);
  // Runs what was posted, then joins the threads.
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  std::shared_ptr<Lane> NewLane();

  // Queues a job and returns at once. `small` (well under a millisecond): the job may run in
  // between the tasks of a larger one, and its own ParallelFor is then serial, so a short prompt
  // does not wait for long ones. Lanes take turns.
  void Post(const std::shared_ptr<Lane>& lane, bool small, Job job);

  // Runs a job here and now if a thread of the pool is idle, in its place, and the lane has no
  // other job: waking that thread would take longer than many a small job. False, and nothing was
  // done, otherwise. A small job's ParallelFor is serial. A large one shares its tasks with the
  // pool; one caller at a time does so, so that no more than one of those who have other work to
  // do, such as reading sockets, is kept from it, and none that is in the middle of a large job.
  bool TryRunHere(const std::shared_ptr<Lane>& lane, bool small, Job& job);

  int threads() const;
  // Jobs that wait.
  int64_t queue_depth() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace structkv::engine
