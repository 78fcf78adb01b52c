// Times the CUDA kernels against the rate at which the same GPU copies memory, in one run. Prints
// JSON, and a table into FILE with --table FILE. Needs nothing but the CUDA runtime.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "tests/gpu/bench_timing.h"
#include "tests/gpu/layer_bench.h"

namespace structkv::gpu {
namespace {

constexpr int64_t kTokens[] = {8192, 32768, 131072, 1048576};

double Floor(const Row& row, double copy) { return row.bytes / copy * 1e6; }

void PrintTable(std::FILE* to, const char* device, double copy, const std::vector<Row>& rows) {
  std::fprintf(to, "%s, copies %.0f GB/s\n\n", device, copy / 1e9);
  std::fprintf(to, "| step | tokens | us a layer | floor | share | bar |\n");
  std::fprintf(to, "|---|---|---|---|---|---|\n");
  for (const Row& row : rows) {
    std::fprintf(to, "| %s | %lld | %.1f | %.1f | %.2f |", row.step.c_str(),
                 static_cast<long long>(row.tokens), row.micros, Floor(row, copy),
                 Floor(row, copy) / row.micros);
    if (row.bar_micros > 0) {
      std::fprintf(to, " %.1f%s", row.bar_micros, row.micros > row.bar_micros ? "; missed" : "");
    }
    std::fprintf(to, " |\n");
  }
}

void PrintJson(const char* device, double copy, const std::vector<Row>& rows) {
  std::printf("{\"device\": \"%s\", \"copy_bytes_per_second\": %.4g, \"rows\": [", device, copy);
  for (const Row& row : rows) {
    std::printf(
        "%s\n  {\"step\": \"%s\", \"tokens\": %lld, \"bytes\": %.0f, \"micros\": %.2f, "
        "\"floor_micros\": %.2f, \"bar_micros\": %.2f}",
        &row == &rows[0] ? "" : ",", row.step.c_str(), static_cast<long long>(row.tokens),
        row.bytes, row.micros, Floor(row, copy), row.bar_micros);
  }
  std::printf("]}\n");
}

int Main(int argc, char** argv) {
  std::FILE* table = nullptr;
  if (argc == 3 && std::strcmp(argv[1], "--table") == 0) {
    table = std::fopen(argv[2], "w");
    if (table == nullptr) {
      std::fprintf(stderr, "structkv_gpu_bench: cannot write '%s'\n", argv[2]);
      return 2;
    }
  } else if (argc > 1) {
    std::fprintf(stderr, "usage: structkv_gpu_bench [--table FILE]\n");
    return 2;
  }
  if (const std::string why = WhyNoGpu(); !why.empty()) {
    std::fprintf(stderr, "structkv_gpu_bench: %s\n", why.c_str());
    return 1;
  }
  cudaDeviceProp properties;
  OrDie(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  Events events;
  const double copy = CopyBytesPerSecond(&events);
  std::vector<Row> rows;
  for (const int64_t tokens : kTokens) {
    LayerBench bench(tokens, properties.l2CacheSize);
    for (Row& row : bench.Measure(&events)) rows.push_back(std::move(row));
  }
  PrintJson(properties.name, copy, rows);
  if (table != nullptr) {
    PrintTable(table, properties.name, copy, rows);
    std::fclose(table);
  }
  return 0;
}

}  // namespace
}  // namespace structkv::gpu

int main(int argc, char** argv) { return structkv::gpu::Main(argc, argv); }
