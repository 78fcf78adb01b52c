// Faults beside neighbours: whatever a test does, what it took comes back, and the neighbours get
// the bytes that they would have got.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#include "tests/testing/nccl_test.h"

namespace structkv::testkit {

class NcclBesideTest : public NcclTest {
 protected:
  // The neighbours run from here on.
  void SetUp() override {
    StartNccl(Options(/*impatient=*/true));
    StartNeighbours();
    files_ = OpenFiles(getpid());
    comms_ = nccl::testing::LiveComms();
  }
  void TearDown() override {
    // Of the prompts and fetches beside the neighbours nothing is left.
    EXPECT_TRUE(Eventually([&] { return server().sessions().active_sessions() == 2; }));
    EXPECT_TRUE(Eventually([&] { return OpenFiles(getpid()) <= files_ + 1; }))  // own connection
        << OpenFiles(getpid()) << " " << files_;
    EXPECT_TRUE(Eventually([&] { return nccl::testing::LiveComms() == comms_; }))
        << nccl::testing::LiveComms() << " communicators, " << comms_ << " before";
    unsetenv("FAKE_NCCL_ABORT_MILLIS");
    ExpectNeighboursUndisturbed();
  }
  int comms() const { return comms_; }

 private:
  int64_t files_ = 0;
  int comms_ = 0;
};

}  // namespace structkv::testkit
