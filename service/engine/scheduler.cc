#include "service/engine/scheduler.h"

#include <sched.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <list>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace structkv::engine {
namespace {

// The tasks of one ParallelFor call. Lives on its caller's stack; guarded by the scheduler's mutex.
struct TaskSet {
  int64_t count = 0;
  absl::FunctionRef<void(int64_t)> task;
  int64_t next = 0;  // first task that nobody has taken
  int64_t done = 0;
  std::shared_ptr<std::condition_variable> finished;  // set while the caller sleeps
};

// Tasks of any ParallelFor that this thread is in the middle of.
thread_local int tasks_on_this_thread = 0;
thread_local bool on_pool_thread = false;

}  // namespace

// Guarded by the scheduler's mutex.
class Scheduler::Lane {
 public:
  struct Waiting {
    bool small = false;
    Job job;
  };
  std::deque<Waiting> jobs;
  std::vector<TaskSet*> sets;  // with tasks that nobody has taken; a nested call's comes last
  bool job_runs = false;
  bool in_turn = false;  // waits in one of the two queues of turns
  uint64_t ticket = 0;   // order of turns over both queues
};

// Two queues of lanes say whose turn is next. `light_`: lanes that offer a task or a small job,
// which any thread may run, also one that waits within a large job. `large_`: lanes whose next job
// is large; only a thread that is in the middle of nothing may start one, so jobs never pile up on
// a stack. A lane that has had its turn goes to the end.
//
// A pool thread sleeps until it is told of work, then runs units until there are none. A thread
// that waits within a large job for its last tasks sleeps on a condition variable of its own.
//
// Of idle threads one is woken that ran last on another core than the caller's: kernels wake a
// thread where it ran last, even where the caller goes on there and other cores have nothing to do.
// And threads are woken with the mutex free: one that runs at once in its waker's place would only
// wait for it.
class Scheduler::Impl {
 public:
  explicit Impl(int threads) : threads_(threads), workers_(static_cast<size_t>(threads)) {
    for (Worker& worker : workers_) idle_.push_back(&worker);
    for (Worker& worker : workers_) {
      worker.thread = std::thread([this, &worker] { RunWorker(worker); });
    }
  }
  ~Impl() {
    {
      const Lock lock(mutex_);
      stopping_ = true;
      if (awake_ == 0) EndWorkers();
    }
    for (Worker& worker : workers_) worker.thread.join();
  }

  void Post(const std::shared_ptr<Lane>& lane, bool small, Job job) {
    Lock lock(mutex_);
    lane->jobs.push_back({small, std::move(job)});
    ++queue_depth_;
    if (Enqueue(lane)) Wake(lock, 1, lane->jobs.front().small);
  }

  bool TryRunHere(const std::shared_ptr<Lane>& lane, bool small, Job& job) {
    Lock lock(mutex_);
    const bool idle = awake_ < threads_ && !OffersLight() && large_.empty();
    if (!idle || lane->job_runs || !lane->jobs.empty()) return false;
    if (!small && (large_here_ || on_pool_thread)) return false;
    ++awake_;
    lane->job_runs = true;
    if (!small) large_here_ = true;
    lock.unlock();
    RunJob(lane, small, job, /*own_tasks_only=*/true);
    lock.lock();
    if (!small) large_here_ = false;
    lane->job_runs = false;
    Enqueue(lane);
    --awake_;
    // What came meanwhile may have found no idle thread.
    const bool light = OffersLight();
    if (light || !large_.empty()) Wake(lock, 1, light);
    return true;
  }

  int threads() const { return threads_; }

  int64_t queue_depth() const {
    const std::lock_guard lock(mutex_);
    return queue_depth_;
  }

 private:
  using Lock = std::unique_lock<std::mutex>;

  // Something to run: a task of a set, or a job.
  struct Unit {
    std::shared_ptr<Lane> lane;
    TaskSet* set = nullptr;
    int64_t index = 0;
    Lane::Waiting job;  // where `set` is null
  };

  // A thread of the pool.
  struct Worker {
    std::thread thread;
    std::condition_variable wake;
    bool told = false;  // to look for work
    bool ends = false;
    int core = -1;  // where it ran last; before that, anywhere
  };

  // A thread that sleeps within a ParallelFor. It may be gone when another one comes to wake it.
  struct Sleeper {
    std::shared_ptr<std::condition_variable> wake = std::make_shared<std::condition_variable>();
    bool listed = false;
  };

  // Gives the lane its next place in the order of turns. False where it has one, or has nothing to
  // offer.
  bool Enqueue(const std::shared_ptr<Lane>& lane) {
    const bool has_tasks = !lane->sets.empty();
    const bool has_job = !lane->job_runs && !lane->jobs.empty();
    if (lane->in_turn || (!has_tasks && !has_job)) return false;
    lane->in_turn = true;
    lane->ticket = next_ticket_++;
    (has_tasks || lane->jobs.front().small ? light_ : large_).push_back(lane);
    return true;
  }

  // Whether there is light work. Lanes whose callers took the last tasks themselves, out of turn,
  // lose their turns.
  bool OffersLight() {
    while (!light_.empty()) {
      const std::shared_ptr<Lane> lane = light_.front();
      const bool has_job = !lane->job_runs && !lane->jobs.empty();
      if (!lane->sets.empty() || (has_job && lane->jobs.front().small)) return true;
      light_.pop_front();
      lane->in_turn = false;
      Enqueue(lane);
    }
    return false;
  }

  // Sees to it that up to `count` threads look for work soon: idle ones first, then those that
  // sleep within a large job, where the work is light. Lets go of the mutex to wake them.
  void Wake(Lock& lock, int64_t count, bool light) {
    std::vector<Worker*> workers;
    for (; count > 0 && awake_ < threads_; --count) {
      ++awake_;
      workers.push_back(TakeIdle());
    }
    std::vector<std::shared_ptr<std::condition_variable>> sleepers;
    for (; light && count > 0 && !sleepers_.empty(); --count) {
      Sleeper* sleeper = sleepers_.front();
      sleepers_.pop_front();
      sleeper->listed = false;
      sleepers.push_back(sleeper->wake);
    }
    if (workers.empty() && sleepers.empty()) return;
    lock.unlock();
    for (Worker* worker : workers) worker->wake.notify_one();
    for (const auto& sleeper : sleepers) sleeper->notify_one();
    lock.lock();
  }

  // There is one: of all threads and a caller in the place of one, fewer than `threads_` are awake.
  Worker* TakeIdle() {
    const int core = sched_getcpu();
    auto taken = std::find_if(idle_.rbegin(), idle_.rend(),
                              [core](const Worker* worker) { return worker->core != core; });
    if (taken == idle_.rend()) taken = idle_.rbegin();
    Worker* const worker = *taken;
    idle_.erase(std::next(taken).base());
    worker->told = true;
    return worker;
  }

  // Takes the unit whose turn it is.
  std::optional<Unit> Next(bool light_only) {
    while (true) {
      std::deque<std::shared_ptr<Lane>>* turns = &light_;
      if (!light_only && !large_.empty() &&
          (light_.empty() || large_.front()->ticket < light_.front()->ticket)) {
        turns = &large_;
      }
      if (turns->empty()) return std::nullopt;
      Unit unit;
      unit.lane = std::move(turns->front());
      turns->pop_front();
      Lane& lane = *unit.lane;
      lane.in_turn = false;
      if (!lane.sets.empty()) {
        unit.set = lane.sets.back();
        unit.index = Claim(lane, *unit.set);
        Enqueue(unit.lane);
        return unit;
      }
      // Its caller may have taken the last tasks itself, out of turn; look afresh at what it
      // offers.
      if (lane.job_runs || lane.jobs.empty()) continue;
      if (turns == &light_ && !lane.jobs.front().small) {
        Enqueue(unit.lane);
        continue;
      }
      unit.job = std::move(lane.jobs.front());
      lane.jobs.pop_front();
      lane.job_runs = true;
      --queue_depth_;
      return unit;
    }
  }

  // Takes a task of a set that has one left.
  static int64_t Claim(Lane& lane, TaskSet& set) {
    const int64_t index = set.next++;
    if (set.next == set.count) std::erase(lane.sets, &set);
    return index;
  }

  void RunTask(Lock& lock, TaskSet& set, int64_t index) {
    lock.unlock();
    ++tasks_on_this_thread;
    set.task(index);
    --tasks_on_this_thread;
    lock.lock();
    if (++set.done < set.count || set.finished == nullptr) return;
    const std::shared_ptr<std::condition_variable> finished = set.finished;
    lock.unlock();
    finished->notify_one();  // the set may be gone
    lock.lock();
  }

  // `own_tasks_only`: within its ParallelFor the thread takes no other light work while it waits.
  void RunJob(const std::shared_ptr<Lane>& lane, bool small, Job& job, bool own_tasks_only) {
    if (small) {
      job(SerialFor);
    } else {
      job([&](int64_t count, absl::FunctionRef<void(int64_t)> task) {
        Parallel(lane, count, task, own_tasks_only);
      });
    }
    job = nullptr;  // what it holds may be large, or may post; not under the lock
  }

  // `nested`: within a ParallelFor.
  void Run(Lock& lock, Unit unit, bool nested) {
    if (unit.set != nullptr) {
      RunTask(lock, *unit.set, unit.index);
      return;
    }
    lock.unlock();
    RunJob(unit.lane, unit.job.small, unit.job.job, /*own_tasks_only=*/false);
    lock.lock();
    unit.lane->job_runs = false;
    const bool offered = Enqueue(unit.lane);
    // This thread looks for work next, but where it is nested it cannot start a large job.
    if (offered && nested && !unit.lane->jobs.front().small) Wake(lock, 1, /*light=*/false);
  }

  // Body of a pool thread.
  void RunWorker(Worker& worker) {
    on_pool_thread = true;
    Lock lock(mutex_);
    while (true) {
      worker.wake.wait(lock, [&] { return worker.told || worker.ends; });
      if (!worker.told) return;
      worker.told = false;
      while (std::optional<Unit> unit = Next(/*light_only=*/false)) {
        Run(lock, *std::move(unit), /*nested=*/false);
      }
      worker.core = sched_getcpu();
      idle_.push_back(&worker);
      if (--awake_ == 0 && stopping_) EndWorkers();
    }
  }

  // Nobody is left who could post more.
  void EndWorkers() {
    for (Worker& worker : workers_) {
      worker.ends = true;
      worker.wake.notify_one();
    }
  }

  void Parallel(const std::shared_ptr<Lane>& lane, int64_t count,
                absl::FunctionRef<void(int64_t)> task, bool own_tasks_only) {
    if (count <= 1) return SerialFor(count, task);
    Sleeper sleeper;
    TaskSet set{.count = count, .task = task};
    Lock lock(mutex_);
    lane->sets.push_back(&set);
    Enqueue(lane);
    Wake(lock, count - 1, /*light=*/true);
    // Within a task only the call's own tasks are taken, so that stacks stay shallow.
    own_tasks_only |= tasks_on_this_thread > 0;
    if (own_tasks_only) {
      while (set.next < set.count) RunTask(lock, set, Claim(*lane, set));
    }
    while (set.done < set.count) {
      std::optional<Unit> unit;
      if (!own_tasks_only) unit = Next(/*light_only=*/true);
      if (unit.has_value()) {
        Run(lock, *std::move(unit), /*nested=*/true);
        continue;
      }
      if (!own_tasks_only) {
        sleepers_.push_back(&sleeper);
        sleeper.listed = true;
      }
      set.finished = sleeper.wake;
      sleeper.wake->wait(
          lock, [&] { return set.done == set.count || (!own_tasks_only && !sleeper.listed); });
      set.finished = nullptr;
      if (sleeper.listed) sleepers_.remove(&sleeper);
      sleeper.listed = false;
    }
    // This thread may have been woken for work that it now leaves behind.
    if (OffersLight()) Wake(lock, 1, /*light=*/true);
  }

  const int threads_;
  mutable std::mutex mutex_;
  std::deque<std::shared_ptr<Lane>> light_;
  std::deque<std::shared_ptr<Lane>> large_;
  std::list<Sleeper*> sleepers_;
  uint64_t next_ticket_ = 0;
  int awake_ = 0;  // pool threads that run, or were told to, and callers that run a job themselves
  int64_t queue_depth_ = 0;
  bool large_here_ = false;  // a caller runs a large job
  std::vector<Worker*> idle_;
  bool stopping_ = false;
  std::vector<Worker> workers_;  // last: its threads use all of the above
};

Scheduler::Scheduler(int threads) : impl_(std::make_unique<Impl>(threads)) {}
Scheduler::~Scheduler() = default;

std::shared_ptr<Scheduler::Lane> Scheduler::NewLane() { return std::make_shared<Lane>(); }

void Scheduler::Post(const std::shared_ptr<Lane>& lane, bool small, Job job) {
  impl_->Post(lane, small, std::move(job));
}

bool Scheduler::TryRunHere(const std::shared_ptr<Lane>& lane, bool small, Job& job) {
  return impl_->TryRunHere(lane, small, job);
}

int Scheduler::threads() const { return impl_->threads(); }

int64_t Scheduler::queue_depth() const { return impl_->queue_depth(); }

}  // namespace structkv::engine
