// structkv-server on the fake CUDA runtime, whose NCCL (--nccl-library) is the fake one: takes the
// server's flags, writes "listening on ADDRESS", and serves until SIGTERM.
#include <pthread.h>

#include <csignal>
#include <cstdio>
#include <variant>

#include "service/config.h"
#include "service/serve_loop.h"
#include "tests/kernels/cuda/fake_backend.h"
#include "tests/testing/fake_nccl/fake_nccl.h"

namespace structkv {
namespace {

using testing::FakeCuda;

int Main(int argc, char** argv) {
  std::variant<Config, EarlyExit> parsed = ParseConfig(argc, argv);
  if (const auto* early = std::get_if<EarlyExit>(&parsed)) {
    std::fputs(early->text.c_str(), stderr);
    return early->exit_code;
  }
  auto& config = std::get<Config>(parsed);
  const auto log = std::make_shared<rpc::Log>(config.log_format);
  config.server.log = config.server.warnings = log;
  config.server.nccl.device_api = nccl::testing::FakeDeviceApi();
  nccl::testing::SetAccess(FakeCuda::BeginAccess, FakeCuda::EndAccess);
  FakeCuda::Reset({});
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  const BackendOptions backend = BackendOptionsOf(config.server);
  cuda::DeviceOptions device;
  device.memory_bytes = backend.device_memory_bytes;
  device.slice_bytes = testing::kFakeSliceBytes;
  device.reserve_bytes = backend.reserve_bytes;
  auto server = Server::Start(std::move(config.server), testing::MakeFakeBackend(device));
  if (!server.ok()) {
    std::fprintf(stderr, "%s\n", server.status().ToString().c_str());
    return 1;
  }
  std::printf("listening on %s\n", (*server)->addresses()[0].c_str());
  std::fflush(stdout);
  return ServeUntilEnd(server->get(), signals, {.drain_limit = [&] { return config.drain_limit; }},
                       log.get())
      .exit_code;
}

}  // namespace
}  // namespace structkv

int main(int argc, char** argv) { return structkv::Main(argc, argv); }
