// A client that opens a prompt at the target argv[1], sends a layer and a half, says so, and then
// does nothing until it is killed.
#include <unistd.h>

#include <cstdio>
#include <memory>

#include "tests/testing/call.h"
#include "tests/testing/prompt_data.h"

int main(int argc, char** argv) {
  using namespace structkv::testkit;  // NOLINT(google-build-using-namespace)
  if (argc != 2) return 2;
  const PromptData data(SmallOpen(), 1);
  Call call(NewChannel(argv[1]));
  call.Send(OpenMessage(data.open()));
  if (!call.WaitForOpened()) return 1;
  call.Send(LayerMessage(data, 0));
  if (!call.WaitForLayer(0)) return 1;
  call.Send(PieceMessage(MakePiece(data, 1, structkv::v1::TENSOR_KEYS, 0, 64)));
  std::puts("sent");
  std::fflush(stdout);
  for (;;) pause();
}
