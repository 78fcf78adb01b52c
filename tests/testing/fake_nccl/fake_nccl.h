// A library that looks like NCCL and moves host memory over unix sockets, between threads or
// processes, and that fails on command. libfake_nccl.so exports the functions of nccl.h that are
// used, and a stand-in for CUDA's streams.
//
//   FAKE_NCCL_FAULT          the fault of every communicator of the process (fake_comm.h)
//   FAKE_NCCL_VERSION        the version that it says it is; 22809
//   FAKE_NCCL_ABORT_MILLIS   how long a slow abort takes; 4000
#pragma once

#include <memory>
#include <string>

#include "service/transport/nccl/device_api.h"
#include "service/transport/nccl/nccl_api.h"

namespace structkv::nccl::testing {

// The library of the build, loaded. Aborts the program where that fails.
std::shared_ptr<const Api> FakeApi();
// Devices 0 and 1, of host memory.
DeviceApi FakeDeviceApi();

// Called before and after each piece of memory that is sent or received is touched, on any thread.
void SetAccess(void (*begin)(), void (*end)());
// For streams of another runtime: `wait` waits for what was queued before.
void SetStreamWait(void (*wait)(Stream*));
// Whether no group is on a stream.
bool StreamDone(Stream* stream);
// Of the next communicator of this process, alone; "hang@0": of the next one that joins as rank 0.
void FaultNext(const std::string& fault);
int LiveComms();
int LiveStreams();
// How many communicators the largest group of aborts since the last call had.
int LargestAbort();

}  // namespace structkv::nccl::testing
