// Any file as a safetensors file. What is accepted has tensors that tile its data.
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <string>

#include "client/cli/safetensors.h"
#include "tests/fuzz/fuzz_input.h"

namespace structkv::cli {
namespace {

void CheckFile(const SafetensorsFile& file, size_t size) {
  uint64_t covered = 0;
  uint8_t sum = 0;
  for (const auto& [name, tensor] : file.tensors()) {
    FUZZ_CHECK(file.Find(name) == &tensor);
    uint64_t bytes = SafetensorsElementBytes(tensor.dtype);
    FUZZ_CHECK(bytes > 0);
    for (int64_t extent : tensor.shape) bytes *= static_cast<uint64_t>(extent);
    FUZZ_CHECK(bytes == tensor.size_bytes());
    covered += bytes;
    // Reads every byte: one outside of the file's mapping would end the process.
    for (std::byte byte : file.Data(tensor))
      sum = static_cast<uint8_t>(sum + std::to_integer<int>(byte));
    FUZZ_CHECK(file.Values<int32_t>(tensor).size() == bytes / 4);
    FUZZ_CHECK(!ShapeText(tensor.shape).empty());
  }
  FUZZ_CHECK(covered + 8 <= size);
}

void Run(const uint8_t* data, size_t size) {
  static const int memory = memfd_create("safetensors", MFD_CLOEXEC);
  static const std::string path = "/proc/self/fd/" + std::to_string(memory);
  FUZZ_CHECK(ftruncate(memory, static_cast<off_t>(size)) == 0);
  FUZZ_CHECK(pwrite(memory, data, size, 0) == static_cast<ssize_t>(size));
  const absl::StatusOr<std::shared_ptr<const SafetensorsFile>> file = SafetensorsFile::Open(path);
  if (file.ok()) {
    CheckFile(**file, size);
  } else {
    FUZZ_CHECK(absl::IsInvalidArgument(file.status()));
    FUZZ_CHECK(std::string(file.status().message()).rfind(path, 0) == 0);
  }
}

}  // namespace
}  // namespace structkv::cli

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  structkv::cli::Run(data, size);
  return 0;
}
