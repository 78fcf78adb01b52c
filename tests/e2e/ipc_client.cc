// A client with memory of a GPU, of the fake CUDA runtime: registers it at the target argv[1] and
// has a prompt compressed there. argv[2]:
//   run   the GPU writes the tensors long after they were named, and the memory is unregistered in
//         the middle of the prompt and freed once the server has closed it; says "same" where the
//         result is that of a prompt that travels in messages, and why not otherwise
//   stuck the GPU does not write them at all; says how the prompt ended
//   hang  has a layer answered and half of another one sent, says "sent", and then does nothing
//         until it is killed
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/imported_memory.h"
#include "tests/kernels/cuda/fake_runtime.h"
#include "tests/testing/answer.h"
#include "tests/testing/gpu_region.h"
#include "tests/testing/process.h"

namespace structkv::testkit {
namespace {

int Fail(const char* why) {
  std::puts(why);
  return 1;
}

int Main(const std::string& target, const std::string& mode) {
  structkv::testing::FakeCuda::Reset({.count = 2});
  const auto channel = NewChannel(target);
  const PromptData data(SmallOpen(100), 5);
  const std::string expected = ResultBytes(Assemble(Run(channel, AllMessages(data))));
  {
    GpuPrompt prompt(data, true);
    GpuRegion& region = prompt.region();
    const grpc::Status status =
        region.Register(channel, ProcessId(), mode == "hang" ? 2000 : 30'000);
    if (!status.ok()) return Fail(status.error_message().c_str());
    const std::vector<v1::CompressRequest> messages = prompt.Messages();
    Call call(channel);
    size_t sent = 0;
    for (; sent < 2; ++sent) call.Send(messages[sent]);
    const auto closed = [&] { return region.State(channel) == v1::REGION_STATE_UNSPECIFIED; };
    if (mode == "stuck") {
      const grpc::Status end = call.Finish().status;
      std::printf("%d: %s\n", end.error_code(), end.error_message().c_str());
      region.Unregister(channel);
      return Eventually(closed) ? 0 : Fail("the region is not closed");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    region.Synchronize();
    if (!call.WaitForLayer(0)) return Fail("layer 0 was not answered");
    if (mode == "hang") {
      v1::CompressRequest half = messages[sent];
      half.mutable_pieces()->mutable_pieces()->RemoveLast();
      call.Send(half);
      std::puts("sent");
      std::fflush(stdout);
      for (;;) pause();
    }
    if (region.Unregister(channel) != 1) return Fail("the region is not in use");
    for (; sent < messages.size(); ++sent) call.Send(messages[sent]);
    call.HalfClose();
    const Answer answer = Assemble(prompt.Get(call.Finish()));
    if (!answer.faults.empty()) return Fail(answer.faults.front().c_str());
    if (ResultBytes(answer) != expected) return Fail("different");
    if (!Eventually(closed)) return Fail("the region is not closed");
  }
  if (structkv::testing::FakeCuda::freed_while_open() != 0) return Fail("freed while it was open");
  std::puts("same");
  return 0;
}

}  // namespace
}  // namespace structkv::testkit

int main(int argc, char** argv) {
  return argc == 3 ? structkv::testkit::Main(argv[1], argv[2]) : 2;
}
