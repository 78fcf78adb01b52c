// The CPU backend's operations at Llama-3.1-8B geometry, each beside its floor in the same run:
// saliency beside the arithmetic peak, gather beside memcpy, turned keys beside gather, selection
// beside nth_element; and 8-bit keys, tensors in blocks and latent keys beside the dense form.
// Rates and shares are of the median run. Google Benchmark's flags; --benchmark_filter=Saliency,
// for instance.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "benchmark/benchmark.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/bench/arithmetic_peak.h"
#include "tests/bench/bench_data.h"
#include "tests/bench/bench_threads.h"
#include "tests/bench/forms_bench.h"

namespace structkv::bench {
namespace {

constexpr double kPeakSeconds = 0.1;

std::unique_ptr<Backend> Cpu(std::string_view target) {
  return cpu::CreateCpuBackend({.target = target}).value();
}

void Saliency(benchmark::State& state, std::string_view target, DType dtype, bool lse,
              int64_t window) {
  const int threads = static_cast<int>(state.range(0));
  const int64_t tokens = state.range(1);
  const std::unique_ptr<Backend> backend = Cpu(target);
  const Tensor keys(dtype, kKvHeads, tokens);
  const Tensor queries(dtype, kQueryHeads, window);
  // Large enough that no exponential overflows; the arithmetic is the same.
  const std::vector<float> log_sums(kQueryHeads * window, 40.0F);
  std::vector<float> out(kKvHeads * tokens);
  SaliencyParams params;
  params.queries = queries.view();
  params.keys = keys.view();
  if (lse) params.lse = log_sums.data();
  // Pairs of bf16 where the set has them; else everything is float32 arithmetic.
  double peak = 0;
  if (dtype == DType::kBF16) {
    peak = PeakFlops(target, Arithmetic::kBf16Pairs, threads, kPeakSeconds);
  }
  if (peak == 0) peak = PeakFlops(target, Arithmetic::kF32, threads, kPeakSeconds);
  Threads pool(threads);
  std::vector<double> seconds;
  for (auto _ : state) {
    const double each = Seconds([&] {
      pool.Run([&](ParallelFor parallel) {
        const absl::Status status = backend->Saliency(params, out.data(), nullptr, parallel);
        if (!status.ok()) state.SkipWithError(std::string(status.message()).c_str());
      });
    });
    seconds.push_back(each);
    state.SetIterationTime(each);
  }
  const double flops =
      2.0 * kQueryHeads * static_cast<double>(window * tokens * kDim);  // the scores alone
  const double rate = flops / Median(seconds);
  state.counters["flops"] = rate;
  state.counters["peak_flops"] = peak;
  state.counters["share_of_peak"] = rate / peak;
}

void Select(benchmark::State& state, std::string_view target) {
  const int64_t tokens = state.range(0);
  const std::unique_ptr<Backend> backend = Cpu(target);
  const std::vector<float> scores = SaliencyLike(tokens);
  std::vector<int32_t> positions(tokens / 10);
  const SelectParams params = {scores.data(), tokens, 8, tokens / 10};
  for (auto _ : state) {
    backend->Select(params, positions.data());
    benchmark::DoNotOptimize(positions.data());
  }
}

// What the standard library has for it: nth_element over positions, then sorted.
void SelectNthElement(benchmark::State& state) {
  const int64_t tokens = state.range(0);
  const std::vector<float> scores = SaliencyLike(tokens);
  std::vector<int32_t> order(tokens);
  const int64_t keep = tokens / 10;
  for (auto _ : state) {
    for (int64_t i = 0; i < tokens; ++i) order[i] = static_cast<int32_t>(i);
    std::nth_element(order.begin(), order.begin() + keep, order.end(), [&](int32_t a, int32_t b) {
      return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
    });
    std::sort(order.begin(), order.begin() + keep);
    benchmark::DoNotOptimize(order.data());
  }
}

// The tokens that selections like a model's keep, of all heads alike or of each.
std::vector<int32_t> KeptPositions(const Backend& backend, int64_t tokens, int64_t kept,
                                   bool per_head) {
  std::vector<int32_t> positions;
  for (int64_t h = 0; h < (per_head ? kKvHeads : 1); ++h) {
    std::vector<int32_t> one(kept);
    const std::vector<float> scores = SaliencyLike(tokens, 7 + static_cast<uint32_t>(h));
    backend.Select({scores.data(), tokens, 8, kept}, one.data());
    positions.insert(positions.end(), one.begin(), one.end());
  }
  return positions;
}

// A tenth of keys and of values, beside memcpy of as many bytes to the same place, in turns.
void Gather(benchmark::State& state, Layout layout, bool per_head) {
  const int threads = static_cast<int>(state.range(0));
  const int64_t tokens = state.range(1);
  const int64_t kept = tokens / 10;
  const std::unique_ptr<Backend> backend = Cpu("");
  const Tensor keys(DType::kBF16, kKvHeads, tokens, layout);
  const Tensor values(DType::kBF16, kKvHeads, tokens, layout);
  Tensor kept_keys(DType::kBF16, kKvHeads, kept, layout);
  Tensor kept_values(DType::kBF16, kKvHeads, kept, layout);
  const std::vector<int32_t> positions = KeptPositions(*backend, tokens, kept, per_head);
  Threads pool(threads);
  // memcpy walks over the whole source in turn, as the gather does: neither finds it in the cache.
  const int64_t bytes = kept_keys.bytes();
  int64_t turn = 0;
  auto copy = [&](ParallelFor parallel) {
    const int64_t from = turn++ % 10 * bytes;
    parallel(threads, [&](int64_t part) {
      const int64_t begin = part * bytes / threads;
      const auto size = static_cast<size_t>((part + 1) * bytes / threads - begin);
      std::memcpy(kept_keys.data() + begin, keys.data() + from + begin, size);
      std::memcpy(kept_values.data() + begin, values.data() + from + begin, size);
    });
  };
  auto gather = [&](ParallelFor parallel) {
    backend->Gather(keys.view(), positions.data(), per_head, kept_keys.mutable_view(), parallel)
        .IgnoreError();
    backend->Gather(values.view(), positions.data(), per_head, kept_values.mutable_view(), parallel)
        .IgnoreError();
  };
  std::vector<double> copy_seconds;
  std::vector<double> gather_seconds;
  for (auto _ : state) {
    copy_seconds.push_back(Seconds([&] { pool.Run(copy); }));
    gather_seconds.push_back(Seconds([&] { pool.Run(gather); }));
    state.SetIterationTime(gather_seconds.back());
  }
  const double total = 2.0 * static_cast<double>(bytes);
  state.counters["bytes_per_s"] = total / Median(gather_seconds);
  state.counters["memcpy_bytes_per_s"] = total / Median(copy_seconds);
  state.counters["share_of_memcpy"] = Median(copy_seconds) / Median(gather_seconds);
}

// A tenth of the keys, turned on their way, beside the same gather without turning, in turns.
void GatherRotated(benchmark::State& state, Layout layout, bool per_head, RotaryPairing pairing) {
  const int threads = static_cast<int>(state.range(0));
  const int64_t tokens = state.range(1);
  const int64_t kept = tokens / 10;
  const std::unique_ptr<Backend> backend = Cpu("");
  const Tensor keys(DType::kBF16, kKvHeads, tokens, layout);
  Tensor kept_keys(DType::kBF16, kKvHeads, kept, layout);
  const std::vector<int32_t> positions = KeptPositions(*backend, tokens, kept, per_head);
  std::vector<float> frequencies(kDim / 2);
  for (size_t j = 0; j < frequencies.size(); ++j) {
    frequencies[j] = std::pow(500000.0F, -2.0F * static_cast<float>(j) / kDim);
  }
  Threads pool(threads);
  std::vector<double> gather_seconds;
  std::vector<double> rotate_seconds;
  for (auto _ : state) {
    gather_seconds.push_back(Seconds([&] {
      pool.Run([&](ParallelFor parallel) {
        backend->Gather(keys.view(), positions.data(), per_head, kept_keys.mutable_view(), parallel)
            .IgnoreError();
      });
    }));
    rotate_seconds.push_back(Seconds([&] {
      pool.Run([&](ParallelFor parallel) {
        backend
            ->GatherRotated(keys.view(), positions.data(), per_head,
                            {.pairing = pairing,
                             .pairs = kDim / 2,
                             .from = frequencies.data(),
                             .to = frequencies.data(),
                             .positions = positions.data()},
                            kept_keys.mutable_view(), parallel)
            .IgnoreError();
      });
    }));
    state.SetIterationTime(rotate_seconds.back());
  }
  const auto bytes = static_cast<double>(kept_keys.bytes());
  state.counters["bytes_per_s"] = bytes / Median(rotate_seconds);
  state.counters["gather_bytes_per_s"] = bytes / Median(gather_seconds);
  state.counters["times_gather"] = Median(rotate_seconds) / Median(gather_seconds);
}

void Register() {
  const std::vector<std::vector<int64_t>> threads_and_tokens = {{1, 2}, {131072}};
  for (const std::string_view target : cpu::CpuTargets()) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      for (const bool lse : {false, true}) {
        const std::string name = "Saliency/" + std::string(DTypeName(dtype)) +
                                 (lse ? "_lse/" : "/") + std::string(target);
        benchmark::RegisterBenchmark(
            name.c_str(), [=](benchmark::State& state) { Saliency(state, target, dtype, lse, 8); })
            ->ArgNames({"threads", "tokens"})
            ->ArgsProduct(threads_and_tokens)
            ->Unit(benchmark::kMillisecond)
            ->UseManualTime();
      }
    }
    const std::string name = "Select/" + std::string(target);
    benchmark::RegisterBenchmark(name.c_str(),
                                 [=](benchmark::State& state) { Select(state, target); })
        ->ArgName("tokens")
        ->Arg(131072)
        ->Unit(benchmark::kMicrosecond);
  }
  benchmark::RegisterBenchmark("SelectNthElement", &SelectNthElement)
      ->ArgName("tokens")
      ->Arg(131072)
      ->Unit(benchmark::kMicrosecond);
  for (const Layout layout : {Layout::kHeadTokenDim, Layout::kTokenHeadDim}) {
    for (const bool per_head : {false, true}) {
      const std::string name =
          "Gather/" + std::string(LayoutName(layout)) + (per_head ? "/per_kv_head" : "/per_layer");
      benchmark::RegisterBenchmark(
          name.c_str(), [=](benchmark::State& state) { Gather(state, layout, per_head); })
          ->ArgNames({"threads", "tokens"})
          ->ArgsProduct(threads_and_tokens)
          ->Unit(benchmark::kMillisecond)
          ->UseManualTime();
      for (const RotaryPairing pairing : {RotaryPairing::kHalfSplit, RotaryPairing::kInterleaved}) {
        const bool halves = pairing == RotaryPairing::kHalfSplit;
        const std::string rotated =
            "GatherRotated" + name.substr(6) + (halves ? "/half_split" : "/interleaved");
        benchmark::RegisterBenchmark(
            rotated.c_str(),
            [=](benchmark::State& state) { GatherRotated(state, layout, per_head, pairing); })
            ->ArgNames({"threads", "tokens"})
            ->ArgsProduct(threads_and_tokens)
            ->Unit(benchmark::kMillisecond)
            ->UseManualTime();
      }
    }
  }
}

}  // namespace
}  // namespace structkv::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  structkv::bench::Register();
  structkv::bench::RegisterForms();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
