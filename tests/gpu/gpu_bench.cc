// Times the CUDA kernels on Llama-3.1-8B's geometry (32 query heads, 8 KV heads of 128, window 8,
// bf16) against the rate at which the same GPU copies memory, in one run. Prints JSON; a table with
// --table. Needs nothing but the CUDA runtime.
//
// Each figure is the median over rounds of CUDA events around several layers, whose keys lie in
// buffers that together are larger than the L2 cache several times over, so that every layer's
// come from device memory.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/saliency.h"
#include "tests/gpu/device_data.h"

namespace structkv::gpu {
namespace {

constexpr int64_t kQueryHeads = 32;
constexpr int64_t kKvHeads = 8;
constexpr int64_t kDim = 128;
constexpr int64_t kWindow = 8;
constexpr int kRounds = 20;
constexpr int kWarmUp = 3;
constexpr int64_t kTokens[] = {8192, 32768, 131072, 1048576};

// One measured step of a layer. The floor is the time in which its bytes move at the copy's rate.
struct Row {
  std::string step;
  int64_t tokens;
  double bytes;
  double micros;
};

class Events {
 public:
  Events() {
    OrDie(cudaEventCreate(&begin_), "cudaEventCreate");
    OrDie(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~Events() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;

  // Microseconds of a call of `work`, the median of the rounds.
  double Median(const std::function<void()>& work) {
    std::vector<float> millis;
    for (int i = 0; i < kWarmUp + kRounds; ++i) {
      OrDie(cudaEventRecord(begin_), "cudaEventRecord");
      work();
      OrDie(cudaEventRecord(end_), "cudaEventRecord");
      OrDie(cudaEventSynchronize(end_), "cudaEventSynchronize");
      float elapsed = 0;
      OrDie(cudaEventElapsedTime(&elapsed, begin_, end_), "cudaEventElapsedTime");
      if (i >= kWarmUp) millis.push_back(elapsed);
    }
    std::sort(millis.begin(), millis.end());
    return 1e3 * static_cast<double>(millis[millis.size() / 2]);
  }

 private:
  cudaEvent_t begin_;
  cudaEvent_t end_;
};

// bf16 values of about a normal distribution's spread, made on the host.
std::vector<uint16_t> Values(size_t count) {
  std::vector<uint16_t> values(count);
  uint32_t state = 12345;
  for (uint16_t& value : values) {
    float sum = 0;
    for (int i = 0; i < 3; ++i) {
      state = state * 1664525 + 1013904223;
      sum += static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0F;
    }
    uint32_t bits;
    std::memcpy(&bits, &sum, sizeof(bits));
    value = static_cast<uint16_t>(bits >> 16);
  }
  return values;
}

// Bytes a second of a copy within the device, read and written.
double CopyBytesPerSecond(Events* events) {
  constexpr size_t kBytes = size_t{1} << 30;
  const DeviceBytes from(kBytes);
  const DeviceBytes to(kBytes);
  const double micros = events->Median([&] {
    OrDie(cudaMemcpyAsync(to.as<void>(), from.as<void>(), kBytes, cudaMemcpyDeviceToDevice),
          "cudaMemcpyAsync");
  });
  return 2.0 * static_cast<double>(kBytes) / (micros * 1e-6);
}

class SaliencyBench {
 public:
  SaliencyBench(int64_t tokens, int64_t l2_bytes)
      : tokens_(tokens),
        per_head_(Floats(kKvHeads * tokens)),
        saliency_(Floats(tokens)),
        centrality_(Floats(tokens)),
        flags_(sizeof(cuda::SaliencyFlags)) {
    const int64_t key_bytes = kKvHeads * tokens * kDim * 2;
    const std::vector<uint16_t> some = Values(size_t{1} << 22);
    for (int64_t bytes = 0; bytes < 4 * l2_bytes || keys_.size() < 2; bytes += key_bytes) {
      keys_.emplace_back(static_cast<size_t>(key_bytes));
      for (int64_t at = 0; at < key_bytes; at += static_cast<int64_t>(some.size()) * 2) {
        const auto part = std::min<int64_t>(key_bytes - at, static_cast<int64_t>(some.size()) * 2);
        OrDie(cudaMemcpy(keys_.back().as<char>() + at, some.data(), static_cast<size_t>(part),
                         cudaMemcpyHostToDevice),
              "cudaMemcpy");
      }
    }
    const std::vector<uint16_t> queries = Values(kQueryHeads * kWindow * kDim);
    queries_.emplace_back(queries.data(), queries.size() * 2);
    const std::vector<float> lse(kQueryHeads * kWindow,
                                 std::log(static_cast<float>(tokens)) + 0.5F);
    lse_.emplace_back(lse.data(), lse.size() * sizeof(float));
    OrDie(cudaMemset(centrality_.as<void>(), 0, centrality_.size()), "cudaMemset");
    cuda::SaliencyRequest request = Request(0, /*with_lse=*/false);
    workspace_.emplace_back(static_cast<size_t>(cuda::SaliencyWorkspaceBytes(request)));
  }

  Row Measure(bool with_lse, Events* events) {
    const size_t layers = std::max<size_t>(keys_.size(), 4);
    const double micros = events->Median([&] {
      for (size_t layer = 0; layer < layers; ++layer) {
        OrDie(cuda::LaunchSaliency(Request(layer % keys_.size(), with_lse), nullptr),
              "LaunchSaliency");
      }
    });
    cuda::SaliencyFlags flags;
    flags_.CopyTo(&flags, sizeof(flags));
    if (flags.score != cuda::kNothingBad) OrDie(cudaErrorUnknown, "a score is not finite");
    // Keys in; saliency of each head, of all and the centrality (in and out).
    const double bytes =
        static_cast<double>(keys_[0].size()) + static_cast<double>((kKvHeads + 3) * tokens_ * 4);
    return {with_lse ? "saliency, lse given" : "saliency", tokens_, bytes,
            micros / static_cast<double>(layers)};
  }

 private:
  static size_t Floats(int64_t count) { return static_cast<size_t>(count) * sizeof(float); }

  cuda::SaliencyRequest Request(size_t buffer, bool with_lse) const {
    cuda::SaliencyRequest request;
    request.queries = TensorView::Dense(queries_[0].as<void>(), DType::kBF16, Layout::kHeadTokenDim,
                                        kQueryHeads, kWindow, kDim);
    request.keys = TensorView::Dense(keys_[buffer].as<void>(), DType::kBF16, Layout::kHeadTokenDim,
                                     kKvHeads, tokens_, kDim);
    if (with_lse) request.lse = lse_[0].as<float>();
    request.scale = 1.0F / std::sqrt(static_cast<float>(kDim));
    request.per_head = per_head_.as<float>();
    request.saliency = saliency_.as<float>();
    request.centrality = centrality_.as<float>();
    request.decay = 0.9F;
    request.flags = flags_.as<cuda::SaliencyFlags>();
    if (!workspace_.empty()) {
      request.workspace = workspace_[0].as<void>();
      request.workspace_bytes = static_cast<int64_t>(workspace_[0].size());
    }
    return request;
  }

  const int64_t tokens_;
  std::vector<DeviceBytes> keys_;
  std::vector<DeviceBytes> queries_;
  std::vector<DeviceBytes> lse_;
  std::vector<DeviceBytes> workspace_;
  const DeviceBytes per_head_;
  const DeviceBytes saliency_;
  const DeviceBytes centrality_;
  const DeviceBytes flags_;
};

void Print(const char* device, double copy, const std::vector<Row>& rows, bool table) {
  if (table) {
    std::printf("%s, copies %.0f GB/s\n\n| step | tokens | us a layer | floor | share |\n", device,
                copy / 1e9);
    std::printf("|---|---|---|---|---|\n");
  } else {
    std::printf("{\"device\": \"%s\", \"copy_bytes_per_second\": %.4g, \"rows\": [", device, copy);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    const double floor = row.bytes / copy * 1e6;
    if (table) {
      std::printf("| %s | %lld | %.1f | %.1f | %.2f |\n", row.step.c_str(),
                  static_cast<long long>(row.tokens), row.micros, floor, floor / row.micros);
    } else {
      std::printf(
          "%s{\"step\": \"%s\", \"tokens\": %lld, \"bytes\": %.0f, \"micros\": %.2f, "
          "\"floor_micros\": %.2f}",
          i == 0 ? "" : ", ", row.step.c_str(), static_cast<long long>(row.tokens), row.bytes,
          row.micros, floor);
    }
  }
  std::printf(table ? "" : "]}\n");
}

int Main(int argc, char** argv) {
  const bool table = argc == 2 && std::strcmp(argv[1], "--table") == 0;
  if (argc > 1 && !table) {
    std::fprintf(stderr, "usage: structkv_gpu_bench [--table]\n");
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
    SaliencyBench bench(tokens, properties.l2CacheSize);
    rows.push_back(bench.Measure(/*with_lse=*/true, &events));
    rows.push_back(bench.Measure(/*with_lse=*/false, &events));
  }
  Print(properties.name, copy, rows, table);
  return 0;
}

}  // namespace
}  // namespace structkv::gpu

int main(int argc, char** argv) { return structkv::gpu::Main(argc, argv); }
