// The other end of a pair, as a process of its own.
//
//   nccl_peer ID RANK send|receive SEED LENGTH...
//
// ID as the fake NCCL writes it. Connects, moves one transfer, compares what came with the data of
// the seed, and closes; each step is a line of output. Fails after half a minute, so that the end
// under test is the first to.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "tests/transport/nccl/pair_kit.h"

namespace structkv::nccl::testing {
namespace {

bool Report(const char* step, const absl::Status& status) {
  std::printf("%s: %s\n", step, status.ToString().c_str());
  std::fflush(stdout);
  return status.ok();
}

int Main(const std::vector<std::string>& arguments) {
  UniqueId id;
  std::strncpy(id.bytes, arguments[0].c_str(), sizeof(id.bytes) - 1);
  const bool send = arguments[2] == "send";
  const uint64_t seed = std::stoull(arguments[3]);
  std::vector<int64_t> lengths;
  for (size_t i = 4; i < arguments.size(); ++i) lengths.push_back(std::stoll(arguments[i]));
  auto worker = StartWorker();
  Outcome connected;
  worker->Connect(1, id, std::stoi(arguments[1]), {connected.Setter(), {}, {}});
  if (!Report("connected", connected.Wait())) return 1;
  const Data expected(lengths, seed);
  Data data(lengths, send ? seed : 0);
  Outcome moved;
  worker->Submit(
      1, MakeTransfer(send ? Direction::kSend : Direction::kReceive, &data, moved.Setter()));
  if (!Report("moved", moved.Wait())) return 1;
  if (!(data == expected)) return Report("compared", absl::DataLossError("other bytes"));
  Outcome closed;
  worker->Close(1, closed.Setter());
  return Report("closed", closed.Wait()) ? 0 : 1;
}

}  // namespace
}  // namespace structkv::nccl::testing

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  return structkv::nccl::testing::Main({argv + 1, argv + argc});
}
