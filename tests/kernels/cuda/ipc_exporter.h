// A child process that exports memory of a GPU.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>

#include "kernels/imported_memory.h"

namespace structkv::testing {

// It has an allocation whose first byte becomes 7 behind an event, once it is told to run its
// stream. Killed and reaped when destroyed. Make it before this process uses CUDA, unless that is
// the fake one: CUDA does not survive a fork.
class IpcExporter {
 public:
  // `says`: what the child answers each request with.
  IpcExporter(int gpu, int64_t bytes, std::function<int64_t()> says);
  ~IpcExporter();
  IpcExporter(const IpcExporter&) = delete;
  IpcExporter& operator=(const IpcExporter&) = delete;

  // Empty where it found no GPU.
  const ExportedMemory& memory() const { return memory_; }
  int64_t RunStream() { return Ask('r'); }
  int64_t Free() { return Ask('f'); }
  void Kill();

 private:
  int64_t Ask(char what);
  [[noreturn]] void Serve(int gpu, int64_t bytes, const std::function<int64_t()>& says) const;

  int to_child_[2];
  int from_child_[2];
  pid_t child_ = -1;
  ExportedMemory memory_;
};

}  // namespace structkv::testing
