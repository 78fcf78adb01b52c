// A client whose GPU is attached to the server at the target argv[1], with groups of argv[2] bytes:
// has a prompt compressed there, by the pair, says "sent" once the first layers are on their way,
// and at the end "same" where the result is that of a prompt that travels in messages.
// FAKE_NCCL_FAULT says what goes wrong.
#include <cstdio>
#include <string>

#include "tests/testing/nccl_prompt.h"

namespace structkv::testkit {
namespace {

int Main(const std::string& target, int64_t group_bytes) {
  const auto channel = NewChannel(target);
  const PromptData data(SmallOpen(), 5);
  const std::string expected = ResultBytes(Assemble(Run(channel, AllMessages(data))));
  nccl::WorkerOptions options = NcclWorkerOptions();
  options.group_bytes = group_bytes;
  NcclClient client(channel, "process", "", options);
  NcclPrompt prompt(data, &client);
  Call call(channel);
  for (uint32_t layer = 0; layer < data.layers(); ++layer) prompt.Offer(layer);
  for (const v1::CompressRequest& message : prompt.Messages()) call.Send(message);
  call.HalfClose();
  std::puts("sent");
  std::fflush(stdout);
  const Outcome outcome = prompt.Finish(&call);
  std::puts(outcome.status.error_message().c_str());
  const bool same = ResultBytes(Assemble(outcome)) == expected;
  std::puts(same ? "same" : "different");
  return same ? 0 : 1;
}

}  // namespace
}  // namespace structkv::testkit

int main(int argc, char** argv) {
  return argc == 3 ? structkv::testkit::Main(argv[1], std::stoll(argv[2])) : 2;
}
