#include "tests/bench/arithmetic_peak.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/bench/arithmetic_peak.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace structkv::bench::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

double F32Loop(int rounds) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  constexpr int kChains = 10;  // two units of five cycles at most; 16 registers hold them
  V acc[kChains];
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) acc[c] = hn::Set(d, static_cast<float>(c));
  const V a = hn::Set(d, 0.999F);
  const V b = hn::Set(d, 0.001F);
  constexpr int kInner = 1000;
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < kInner; ++i) {
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) acc[c] = hn::MulAdd(acc[c], a, b);
    }
  }
  V sum = acc[0];
#pragma GCC unroll 16
  for (int c = 1; c < kChains; ++c) sum = hn::Add(sum, acc[c]);
  Consume(hn::GetLane(sum));
  return 2.0 * kChains * kInner * static_cast<double>(hn::Lanes(d)) * rounds;
}

}  // namespace structkv::bench::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

PeakLoop F32LoopOf(std::string_view target) {
#if HWY_TARGETS & HWY_AVX3_DL
  if (target == "avx3_dl") return &N_AVX3_DL::F32Loop;
#endif
#if HWY_TARGETS & HWY_AVX3
  if (target == "avx3" || target == "avx3_bf16") return &N_AVX3::F32Loop;
#endif
#if HWY_TARGETS & HWY_AVX2
  if (target == "avx2") return &N_AVX2::F32Loop;
#endif
#if HWY_TARGETS & HWY_SSE4
  if (target == "sse4") return &N_SSE4::F32Loop;
#endif
  if (target == "baseline") return HWY_STATIC_DISPATCH(F32Loop);
  return nullptr;
}

// Whatever else the machine does, some burst runs without it.
constexpr int kBursts = 10;

// Operations per second of threads that start together, each on a processor of its own where there
// are enough.
double Burst(PeakLoop loop, int threads, double seconds) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  sched_getaffinity(0, sizeof(allowed), &allowed);
  std::vector<int> processors;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) processors.push_back(cpu);
  }
  std::atomic<int> waiting{threads};
  std::vector<double> rates(static_cast<size_t>(threads));
  auto work = [&](size_t index) {
    if (threads > 1 && rates.size() <= processors.size()) {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(processors[index], &one);
      sched_setaffinity(0, sizeof(one), &one);
    }
    loop(10);
    waiting.fetch_sub(1);
    while (waiting.load() > 0) {
    }
    double done = 0;
    const Clock::time_point start = Clock::now();
    double elapsed = 0;
    do {
      done += loop(10);
      elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    } while (elapsed < seconds);
    rates[index] = done / elapsed;
  };
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(work, static_cast<size_t>(i));
  for (std::thread& worker : workers) worker.join();
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

}  // namespace

void Consume(float value) {
  static std::atomic<float> sink;
  sink.store(value, std::memory_order_relaxed);
}

double PeakFlops(std::string_view target, Arithmetic arithmetic, int threads, double seconds) {
  const PeakLoop loop = arithmetic == Arithmetic::kF32 ? F32LoopOf(target)
                        : target == "avx3_bf16"        ? Bf16PairsLoop()
                                                       : nullptr;
  if (loop == nullptr) return 0;
  double best = 0;
  for (int i = 0; i < kBursts; ++i) best = std::max(best, Burst(loop, threads, seconds / kBursts));
  return best;
}

}  // namespace structkv::bench
#endif  // HWY_ONCE
