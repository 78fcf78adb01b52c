#include "tests/testing/fake_nccl/fake_nccl.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

namespace structkv::nccl::testing {
namespace {

template <typename Function>
Function* Find(const char* name) {
  static void* const library = dlopen(STRUCTKV_FAKE_NCCL, RTLD_NOW | RTLD_LOCAL);
  void* const symbol = library != nullptr ? dlsym(library, name) : nullptr;
  if (symbol == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::abort();
  }
  return reinterpret_cast<Function*>(symbol);
}

}  // namespace

std::shared_ptr<const Api> FakeApi() {
  absl::StatusOr<std::shared_ptr<const Api>> api = Api::Load(STRUCTKV_FAKE_NCCL);
  if (!api.ok()) {
    std::fprintf(stderr, "%s\n", api.status().ToString().c_str());
    std::abort();
  }
  return *api;
}

DeviceApi FakeDeviceApi() {
  DeviceApi api;
  api.set_device = [](int device) {
    return device < 2 ? absl::OkStatus() : absl::InvalidArgumentError("there are devices 0 and 1");
  };
  api.create_stream = []() -> absl::StatusOr<Stream*> {
    return Find<Stream*()>("fakeStreamCreate")();
  };
  api.destroy_stream = [](Stream* stream) { Find<void(Stream*)>("fakeStreamDestroy")(stream); };
  api.wait_event = [](Stream*, void*) { return absl::OkStatus(); };
  api.stream_done = [](Stream* stream) -> absl::StatusOr<bool> { return StreamDone(stream); };
  api.bus_id = [](int) -> absl::StatusOr<std::string> { return std::string("0000:00:00.0"); };
  return api;
}

void SetAccess(void (*begin)(), void (*end)()) {
  Find<void(void (*)(), void (*)())>("fakeNcclSetAccess")(begin, end);
}

void SetStreamWait(void (*wait)(Stream*)) {
  Find<void(void (*)(Stream*))>("fakeNcclSetStreamWait")(wait);
}

bool StreamDone(Stream* stream) { return Find<int(Stream*)>("fakeStreamDone")(stream) == 1; }

void FaultNext(const std::string& fault) {
  Find<void(const char*)>("fakeNcclFaultNext")(fault.c_str());
}

int LiveComms() { return Find<int()>("fakeNcclLiveComms")(); }

int LiveStreams() { return Find<int()>("fakeNcclLiveStreams")(); }

int LargestAbort() { return Find<int()>("fakeNcclLargestAbort")(); }

}  // namespace structkv::nccl::testing
