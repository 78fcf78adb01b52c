// A server with shared memory, and a client that has registered some.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "service/server.h"
#include "structkv/v1/compression.grpc.pb.h"
#include "structkv/v1/region.grpc.pb.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"
#include "tests/testing/shared_region.h"

namespace structkv::testkit {

class RegionTest : public ServiceTest {
 protected:
  // Checks that nothing is mapped any more, once the test's connections are closed.
  ~RegionTest() override;

  // TestOptions() with a region socket of its own.
  ServerOptions Options();
  // Also connects to the region socket. `options` are made of Options().
  void StartShared(const ServerOptions& options);
  void StartShared() { StartShared(Options()); }

  // Registers a sealed file, writable; a failure fails the test.
  std::string Register(const SharedFile& file);
  // What the server knows of a region; nothing set where that is nothing.
  v1::GetRegionResponse Get(const std::string& handle);
  // A prompt in a file of its own.
  struct Placed {
    std::unique_ptr<SharedFile> file;
    std::unique_ptr<RangedPrompt> ranged;
  };
  Placed Place(const PromptData& data, bool results = true);
  // Its messages with ranges.
  static std::vector<v1::CompressRequest> Messages(const PromptData& data, Placed* placed,
                                                   bool keys_and_values = false);

  RegionConnection& connection() { return *connection_; }
  const std::string& socket_path() const { return path_; }
  std::unique_ptr<v1::Regions::Stub> Regions() { return v1::Regions::NewStub(channel()); }
  int64_t mapped_bytes() { return server().regions()->mapped_bytes(); }

 private:
  TemporaryDirectory directory_;
  const std::string path_ = directory_.Path("regions");
  std::unique_ptr<RegionConnection> connection_;
};

}  // namespace structkv::testkit
