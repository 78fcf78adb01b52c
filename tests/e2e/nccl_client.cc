// A client whose GPU is attached to the server at the target argv[1], with groups of argv[2] bytes:
// has a prompt compressed there, by the pair, or fetches the held cache argv[3] (hexadecimal). Says
// "sent" once the first layers are on their way, and at the end "same" where the result is what
// travels in messages.
// FAKE_NCCL_FAULT says what goes wrong.
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/escaping.h"
#include "tests/testing/nccl_fetch.h"
#include "tests/testing/nccl_prompt.h"

namespace structkv::testkit {
namespace {

void Say(const std::string& text) {
  std::puts(text.c_str());
  std::fflush(stdout);
}

bool Compress(const std::shared_ptr<grpc::Channel>& channel, NcclClient* client) {
  const PromptData data(SmallOpen(), 5);
  const std::string expected = ResultBytes(Assemble(Run(channel, AllMessages(data))));
  NcclPrompt prompt(data, client);
  Call call(channel);
  for (uint32_t layer = 0; layer < data.layers(); ++layer) prompt.Offer(layer);
  for (const v1::CompressRequest& message : prompt.Messages()) call.Send(message);
  call.HalfClose();
  Say("sent");
  const Outcome outcome = prompt.Finish(&call);
  Say(outcome.status.error_message());
  return ResultBytes(Assemble(outcome)) == expected;
}

bool FetchIt(const std::shared_ptr<grpc::Channel>& channel, NcclClient* client,
             const std::string& handle) {
  const std::string expected = Fetch(channel, FetchRequest(handle)).bytes;
  NcclFetch fetch(channel, client, FetchRequest(handle));
  for (int i = 0; i < 2; ++i) fetch.ReadOne();  // what it is, and a layer
  fetch.TakeRows();
  Say("sent");
  const Fetched fetched = fetch.Finish();
  Say(fetched.status.error_message());
  return fetched.status.ok() && fetched.bytes == expected;
}

int Main(const std::string& target, int64_t group_bytes, const std::string& handle) {
  const auto channel = NewChannel(target);
  nccl::WorkerOptions options = NcclWorkerOptions();
  options.group_bytes = group_bytes;
  NcclClient client(channel, "process", "", options);
  const bool same = handle.empty() ? Compress(channel, &client)
                                   : FetchIt(channel, &client, absl::HexStringToBytes(handle));
  Say(same ? "same" : "different");
  return same ? 0 : 1;
}

}  // namespace
}  // namespace structkv::testkit

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) return 2;
  return structkv::testkit::Main(argv[1], std::stoll(argv[2]), argc == 4 ? argv[3] : "");
}
