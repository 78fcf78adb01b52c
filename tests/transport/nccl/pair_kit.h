// What tests of NCCL pairs share: outcomes that are waited for, data that can be told apart, and
// what must be as it was afterwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "service/transport/nccl/transfer.h"
#include "service/transport/nccl/worker.h"

namespace structkv::nccl::testing {

// A status that somebody else's thread sets, once.
class Outcome {
 public:
  Outcome();
  // For one caller; may outlive this object.
  Worker::Done Setter() const;
  bool is_set() const;
  // DEADLINE_EXCEEDED where it does not come within `limit`.
  absl::Status Wait(absl::Duration limit = absl::Seconds(30)) const;

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
};

// Buffers of the given lengths, filled from the seed, or (0) with zeros.
class Data {
 public:
  Data(std::vector<int64_t> lengths, uint64_t seed);
  std::vector<Buffer> buffers();
  bool operator==(const Data& other) const { return all_ == other.all_; }

 private:
  std::vector<std::vector<std::byte>> all_;
};

// `data` must outlive the transfer.
Transfer MakeTransfer(Direction direction, Data* data, Worker::Done done);

// Small groups, and limits that a slow machine does not come near.
WorkerOptions QuickOptions();
// As those, but connecting and a group may take 3 seconds alone.
WorkerOptions ImpatientOptions();
std::unique_ptr<Worker> StartWorker(WorkerOptions options = QuickOptions());
UniqueId MakeId(Worker* worker);
// Connects two ends, which need not be of different workers' processes.
void ConnectPair(Worker* a, Worker* b, PeerId peer);

// What this process has.
struct Held {
  int64_t threads = 0;
  int64_t files = 0;
  int comms = 0;
  int streams = 0;
  bool operator==(const Held&) const = default;
  static Held Now();
};
void PrintTo(const Held& held, std::ostream* out);

}  // namespace structkv::nccl::testing
