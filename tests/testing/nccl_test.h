// A server on the fake CUDA runtime whose NCCL is the fake library, and neighbours that must not
// notice what goes wrong beside them.
#pragma once

#include <memory>
#include <string>

#include "tests/kernels/cuda/fake_backend.h"
#include "tests/testing/fake_nccl/fake_nccl.h"
#include "tests/testing/nccl_prompt.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {

// A prompt by a pair of its own that is in the middle while something happens beside it: the first
// layer is answered at construction, the rest is sent by Finish().
class NcclNeighbour {
 public:
  NcclNeighbour(const std::shared_ptr<grpc::Channel>& channel, const PromptData* data)
      : data_(*data), client_(channel, "neighbour"), prompt_(data_, &client_), call_(channel) {
    const std::vector<v1::CompressRequest> messages = prompt_.Messages();
    call_.Send(messages[0]);
    prompt_.Offer(0);
    call_.Send(messages[1]);
    call_.WaitForLayer(0);
    prompt_.TakeAll(&call_);
  }
  Outcome Finish() {
    const std::vector<v1::CompressRequest> messages = prompt_.Messages();
    for (uint32_t layer = 1; layer < data_.layers(); ++layer) prompt_.Offer(layer);
    for (size_t i = 2; i < messages.size(); ++i) call_.Send(messages[i]);
    call_.HalfClose();
    return prompt_.Finish(&call_);
  }

 private:
  const PromptData& data_;
  NcclClient client_;
  NcclPrompt prompt_;
  Call call_;
};

class NcclTest : public ServiceTest {
 protected:
  static constexpr int64_t kReserveBytes = int64_t{8} << 20;

  NcclTest() {
    nccl::testing::SetAccess(structkv::testing::FakeCuda::BeginAccess,
                             structkv::testing::FakeCuda::EndAccess);
    nccl::testing::FaultNext("");
    structkv::testing::FakeCuda::Reset({});
  }
  ~NcclTest() override {
    if (server().nccl_status().ok()) ExpectNothingReserved();
  }

  static ServerOptions Options(bool impatient = false) {
    ServerOptions options = TestOptions();
    options.nccl.library = STRUCTKV_FAKE_NCCL;
    options.nccl.device_api = nccl::testing::FakeDeviceApi();
    options.nccl.worker = NcclWorkerOptions(impatient);
    options.streams.stall = absl::Seconds(impatient ? 2 : 30);
    options.sessions.hold.budget_bytes = int64_t{64} << 20;
    return options;
  }
  void StartNccl(const ServerOptions& options = Options(), int64_t reserve_bytes = kReserveBytes) {
    StartAlone(options, structkv::testing::MakeFakeBackend(
                            {.memory_bytes = (int64_t{64} << 20) + reserve_bytes,
                             .reserve_bytes = reserve_bytes,
                             .lanes = 3,
                             .slice_bytes = structkv::testing::kFakeSliceBytes}));
    ASSERT_TRUE(server().nccl_status().ok()) << server().nccl_status();
  }
  // A prompt for each transport beside which something happens.
  void StartNeighbours() {
    undisturbed_ = Inline(neighbour_data_);
    inline_neighbour_ = std::make_unique<Neighbour>(NewChannel(target()), &neighbour_data_);
    nccl_neighbour_ = std::make_unique<NcclNeighbour>(NewChannel(target()), &neighbour_data_);
  }
  void ExpectNeighboursUndisturbed() {
    ExpectResult(nccl_neighbour_->Finish(), undisturbed_, "nccl");
    ExpectResult(inline_neighbour_->Finish(), undisturbed_, "inline");
    inline_neighbour_.reset();
    nccl_neighbour_.reset();
    ExpectNothingReserved();
  }

  std::string Inline(const PromptData& data) {
    const Outcome outcome = Run(AllMessages(data));
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    return ResultBytes(Assemble(outcome));
  }
  void ExpectResult(const Outcome& outcome, const std::string& expected,
                    const std::string& transport = "nccl") {
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    const Answer answer = Assemble(outcome);
    EXPECT_TRUE(answer.faults.empty()) << answer.faults.front();
    EXPECT_TRUE(ResultBytes(answer) == expected);
    ASSERT_TRUE(answer.summary.has_value());
    EXPECT_EQ(answer.summary->transport(), transport);
  }
  // All of the GPU's memory for transfers can be had at once, and no transfer of a session is left.
  void ExpectNothingReserved() {
    const Backend& backend = server().sessions().backend();
    EXPECT_TRUE(Eventually([&] { return backend.Reserve(0, backend.reservable_bytes(0)).ok(); }));
  }

 private:
  PromptData neighbour_data_{SmallOpen(300), 77};
  std::string undisturbed_;
  std::unique_ptr<Neighbour> inline_neighbour_;
  std::unique_ptr<NcclNeighbour> nccl_neighbour_;
};

}  // namespace structkv::testkit
