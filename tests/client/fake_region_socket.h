// The server's end of region registration, as a test wants it.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "structkv/v1/region.pb.h"
#include "tests/testing/process.h"

namespace structkv::client {

// A registered descriptor.
struct RegisteredRegion {
  v1::RegisterDescriptorRequest request;
  int seals = 0;
  std::shared_ptr<std::byte> memory;  // mapped for reading and writing
};

class FakeRegionSocket {
 public:
  FakeRegionSocket();
  ~FakeRegionSocket();

  const std::string& path() const { return path_; }
  // Answers what follows with a failure; code 0: registers again.
  void Refuse(uint32_t code, const std::string& message);
  // Ends all connections, as a server that is gone.
  void CloseConnections();
  // Registered ones so far. The handle of number i is 16 times 'a' + i.
  std::vector<RegisteredRegion> regions() const;
  // Connections whose client has not closed them.
  int connections() const;

 private:
  void Serve();
  v1::RegisterDescriptorResponse Register(int connection);

  const testkit::TemporaryDirectory directory_;
  const std::string path_;
  int listener_ = -1;
  int stop_[2] = {-1, -1};
  mutable absl::Mutex mutex_;
  uint32_t refusal_ ABSL_GUARDED_BY(mutex_) = 0;
  std::string refusal_text_ ABSL_GUARDED_BY(mutex_);
  std::vector<RegisteredRegion> regions_ ABSL_GUARDED_BY(mutex_);
  std::vector<int> connections_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace structkv::client
