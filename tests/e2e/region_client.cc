// A client with shared memory: registers a descriptor at the region socket argv[2] and a name,
// makes another name that it does not register, opens prompts at the target argv[1] that use both
// regions, has a layer of each answered and half of another one sent, says so, and then does
// nothing until it is killed. The names end in argv[3].
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "structkv/v1/region.grpc.pb.h"
#include "tests/testing/call.h"
#include "tests/testing/prompt_data.h"
#include "tests/testing/shared_region.h"

namespace structkv::testkit {
namespace {

std::string RegisterName(const std::shared_ptr<grpc::Channel>& channel, const SharedFile& file,
                         const std::string& name) {
  grpc::ClientContext context;
  v1::RegisterRegionRequest request;
  request.set_name(name);
  request.set_size_bytes(file.size());
  request.set_lease_millis(300);
  request.set_writable(true);
  v1::RegisterRegionResponse response;
  const grpc::Status status =
      v1::Regions::NewStub(channel)->RegisterRegion(&context, request, &response);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.error_message().c_str());
  return response.handle();
}

int Main(const std::string& target, const std::string& socket, const std::string& suffix) {
  const PromptData data(SmallOpen(), 1);
  const uint64_t bytes = RangedPrompt::BytesFor(data);
  const auto channel = NewChannel(target);
  RegionConnection connection(socket);
  const auto sealed = SharedFile::Sealed(bytes);
  const auto named = SharedFile::Named("structkv.registered-" + suffix, bytes);
  const auto left = SharedFile::Named("structkv.left-" + suffix, bytes);
  RangedPrompt prompts[] = {
      {data, sealed.get(), connection.Register(*sealed).handle(), true},
      {data, named.get(), RegisterName(channel, *named, "structkv.registered-" + suffix), true}};
  std::vector<std::unique_ptr<Call>> calls;
  for (RangedPrompt& prompt : prompts) {
    Call& call = *calls.emplace_back(std::make_unique<Call>(channel));
    call.Send(OpenMessage(prompt.Open(data.open())));
    call.Send(prompt.Put(LayerMessage(data, 0)));
    if (!call.WaitForLayer(0)) return 1;
    call.Send(prompt.Put(PieceMessage(MakePiece(data, 1, v1::TENSOR_KEYS))));
  }
  std::puts("sent");
  std::fflush(stdout);
  for (;;) pause();
}

}  // namespace
}  // namespace structkv::testkit

int main(int argc, char** argv) {
  return argc == 4 ? structkv::testkit::Main(argv[1], argv[2], argv[3]) : 2;
}
