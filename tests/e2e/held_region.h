// A server that holds caches and shares memory, and a region for them to be fetched into.
#pragma once

#include <memory>
#include <string>

#include "tests/e2e/held_test.h"
#include "tests/testing/region_test.h"

namespace structkv::testkit {

class HoldingRegionTest : public HoldingTest<RegionTest> {
 protected:
  void SetUp() override {
    ServerOptions options = HoldOptions(Options());
    options.sessions.hold.budget_bytes = int64_t{256} << 20;
    options.streams.max_message_bytes = int64_t{32} << 20;
    StartShared(options);
    file_ = SharedFile::Sealed(4 << 20);
    region_ = Register(*file_);
  }

  std::unique_ptr<SharedFile> file_;
  std::string region_;  // its handle
};

}  // namespace structkv::testkit
