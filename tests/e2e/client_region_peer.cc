// A client that opens a prompt over shared memory at the target argv[1], in a region of the kind
// argv[2] ("descriptor" or "named"), sends a layer and a half, says so, and then does nothing until
// it is killed.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "structkv/arena.h"
#include "structkv/client.h"
#include "tests/e2e/client_prompt.h"

namespace structkv::testkit {
namespace {

int Run(const std::string& target, bool named) {
  client::RegionOptions region;
  region.size_bytes = 1 << 20;
  region.kind = named ? client::RegionKind::kNamed : client::RegionKind::kDescriptor;
  region.lease = named ? absl::Milliseconds(500) : absl::ZeroDuration();
  const auto made = client::Region::Create(region);
  if (!made.ok()) return 1;
  const PromptData data(SmallOpen(), 1);
  client::SessionOptions options;
  options.transport = client::TransportChoice::kSharedMemory;
  options.staging = std::make_shared<client::Arena>(*made);
  options.results = options.staging;
  const auto client = client::Client::Connect(target);
  auto session = (*client)->OpenPrompt(data.open(), options);
  if (!session.ok()) {
    std::fprintf(stderr, "%s\n", session.status().ToString().c_str());
    return 1;
  }
  client::LayerTensors tensors = TensorsOf(data, 0);
  if (!(*session)->SendLayer(0, tensors).ok() || !(*session)->NextEvent().ok()) return 1;
  tensors = TensorsOf(data, 1);
  tensors.values = {};
  if (!(*session)->SendLayer(1, tensors).ok()) return 1;
  std::puts("sent");
  std::fflush(stdout);
  for (;;) pause();
}

}  // namespace
}  // namespace structkv::testkit

int main(int argc, char** argv) {
  return argc == 3 ? structkv::testkit::Run(argv[1], std::strcmp(argv[2], "named") == 0) : 2;
}
