#include "tests/transport/nccl/pair_kit.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <ostream>
#include <random>
#include <thread>

#include "gtest/gtest.h"
#include "tests/testing/fake_nccl/fake_nccl.h"

namespace structkv::nccl::testing {

struct Outcome::Shared {
  std::mutex mutex;
  std::condition_variable changed;
  bool set = false;
  absl::Status status;
};

Outcome::Outcome() : shared_(std::make_shared<Shared>()) {}

Worker::Done Outcome::Setter() const {
  return [shared = shared_](const absl::Status& status) {
    std::lock_guard lock(shared->mutex);
    EXPECT_FALSE(shared->set) << "told twice: " << status;
    shared->set = true;
    shared->status = status;
    shared->changed.notify_all();
  };
}

bool Outcome::is_set() const {
  std::lock_guard lock(shared_->mutex);
  return shared_->set;
}

absl::Status Outcome::Wait(absl::Duration limit) const {
  std::unique_lock lock(shared_->mutex);
  if (!shared_->changed.wait_for(lock, absl::ToChronoNanoseconds(limit),
                                 [this] { return shared_->set; })) {
    return absl::DeadlineExceededError("no outcome");
  }
  return shared_->status;
}

Data::Data(std::vector<int64_t> lengths, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (int64_t length : lengths) {
    std::vector<std::byte>& buffer = all_.emplace_back(static_cast<size_t>(length));
    if (seed == 0) continue;
    for (size_t at = 0; at < buffer.size(); at += sizeof(uint64_t)) {
      const uint64_t word = random();
      std::memcpy(&buffer[at], &word, std::min(sizeof(word), buffer.size() - at));
    }
  }
}

std::vector<Buffer> Data::buffers() {
  std::vector<Buffer> buffers;
  for (std::vector<std::byte>& buffer : all_) {
    buffers.push_back({buffer.data(), static_cast<int64_t>(buffer.size())});
  }
  return buffers;
}

Transfer MakeTransfer(Direction direction, Data* data, Worker::Done done) {
  Transfer transfer;
  transfer.direction = direction;
  transfer.buffers = data->buffers();
  transfer.done = std::move(done);
  return transfer;
}

WorkerOptions QuickOptions() {
  WorkerOptions options;
  options.connect_limit = absl::Seconds(30);
  options.group_limit = absl::Seconds(30);
  options.close_limit = absl::Seconds(30);
  options.silence_limit = absl::Seconds(60);
  options.tick_interval = absl::Milliseconds(20);
  options.group_bytes = int64_t{16} << 20;
  return options;
}

WorkerOptions ImpatientOptions() {
  WorkerOptions options = QuickOptions();
  options.connect_limit = absl::Seconds(3);
  options.group_limit = absl::Seconds(3);
  return options;
}

std::unique_ptr<Worker> StartWorker(WorkerOptions options) {
  return *Worker::Start(FakeApi(), FakeDeviceApi(), std::move(options));
}

UniqueId MakeId(Worker* worker) {
  Outcome outcome;
  auto id = std::make_shared<UniqueId>();
  worker->MakeId([id, set = outcome.Setter()](absl::StatusOr<UniqueId> made) mutable {
    if (made.ok()) *id = *made;
    set(made.status());
  });
  EXPECT_EQ(outcome.Wait(), absl::OkStatus());
  return *id;
}

void ConnectPair(Worker* a, Worker* b, PeerId peer) {
  const UniqueId id = MakeId(b);
  Outcome first;
  Outcome second;
  a->Connect(peer, id, 0, {first.Setter(), {}, {}});
  b->Connect(peer, id, 1, {second.Setter(), {}, {}});
  ASSERT_EQ(first.Wait(), absl::OkStatus());
  ASSERT_EQ(second.Wait(), absl::OkStatus());
}

Held Held::Now() {
  // The thread sanitizer starts a thread of its own beside the first.
  static const bool started = [] {
    std::thread([] {}).join();
    return true;
  }();
  static_cast<void>(started);
  const auto count = [](const char* directory) {
    int64_t entries = 0;
    for (const auto& entry : std::filesystem::directory_iterator(directory)) {
      static_cast<void>(entry);
      ++entries;
    }
    return entries;
  };
  return {count("/proc/self/task"), count("/proc/self/fd"), LiveComms(), LiveStreams()};
}

void PrintTo(const Held& held, std::ostream* out) {
  *out << held.threads << " threads, " << held.files << " files, " << held.comms
       << " communicators, " << held.streams << " streams";
}

}  // namespace structkv::nccl::testing
