// Times layers that come from the host on a GPU against their copies and their computation alone.
// Prints JSON, and appends a table to FILE with --table FILE.
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "kernels/cuda/cuda_backend.h"
#include "tests/gpu/overlap_bench.h"

namespace structkv::gpu {
namespace {

// Calls of four prompts with 131,072 tokens and their next layers' keys, and apart from them what
// the benchmark keeps on the GPU itself.
constexpr int64_t kApartBytes = int64_t{3} << 30;
constexpr int64_t kMemoryBytes = (int64_t{5} << 30) + kApartBytes;

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "structkv_overlap_bench: %s\n", status.ToString().c_str());
  return 1;
}

int Main(int argc, char** argv) {
  const bool has_table = argc == 3 && std::strcmp(argv[1], "--table") == 0;
  if (argc > 1 && !has_table) {
    std::fprintf(stderr, "usage: structkv_overlap_bench [--table FILE]\n");
    return 2;
  }
  cuda::CudaOptions options = {.device_memory_bytes = kMemoryBytes, .reserve_bytes = kApartBytes};
  for (auto* event : {&options.events.fell_back, &options.events.not_pinned}) {
    *event = [](const absl::Status& why) { (void)Fail(why); };
  }
  const absl::StatusOr<std::unique_ptr<Backend>> backend =
      cuda::CreateCudaBackend(std::move(options));
  if (!backend.ok()) return Fail(backend.status());
  const absl::StatusOr<std::vector<OverlapRow>> rows = MeasureOverlap(**backend, {});
  if (!rows.ok()) return Fail(rows.status());
  std::fputs(OverlapJson((*backend)->device(), *rows).c_str(), stdout);
  if (!has_table) return 0;
  std::FILE* const table = std::fopen(argv[2], "a");
  if (table == nullptr || std::fputs(OverlapTable(*rows).c_str(), table) < 0 ||
      std::fclose(table) != 0) {
    std::fprintf(stderr, "structkv_overlap_bench: cannot write '%s'\n", argv[2]);
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace structkv::gpu

int main(int argc, char** argv) { return structkv::gpu::Main(argc, argv); }
