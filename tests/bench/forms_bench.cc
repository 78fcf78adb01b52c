#include "tests/bench/forms_bench.h"

#include <memory>
#include <string>
#include <vector>

#include "benchmark/benchmark.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/bench/arithmetic_peak.h"
#include "tests/bench/bench_data.h"
#include "tests/bench/bench_threads.h"

namespace structkv::bench {
namespace {

constexpr int64_t kWindow = 8;

struct Geometry {
  std::string_view name;
  int64_t query_heads;
  int64_t kv_heads;
  int64_t dim;
};
constexpr Geometry kLlama = {"llama", kQueryHeads, kKvHeads, kDim};
constexpr Geometry kLatent = {"latent", 128, 1, 576};

struct Form {
  DType queries = DType::kBF16;
  DType keys = DType::kBF16;
  int64_t block_tokens = 0;  // 0: dense
  Layout layout = Layout::kHeadTokenDim;
};

std::string Name(const Form& form) {
  std::string name = std::string(DTypeName(form.queries)) + "_" + std::string(DTypeName(form.keys));
  if (form.block_tokens == 0) return name;
  return name + "_blocks_" + std::to_string(form.block_tokens) +
         (form.layout == Layout::kHeadTokenDim ? "_head_first" : "");
}

// Saliency of keys in a form, and of dense ones of the queries' type.
void Saliency(benchmark::State& state, std::string_view target, const Geometry& geometry,
              const Form& form) {
  const int threads = static_cast<int>(state.range(0));
  const int64_t tokens = state.range(1);
  const std::unique_ptr<Backend> backend = cpu::CreateCpuBackend({.target = target}).value();
  const Tensor queries(form.queries, geometry.query_heads, kWindow, Layout::kHeadTokenDim,
                       geometry.dim);
  const Tensor dense(form.queries, geometry.kv_heads, tokens, Layout::kHeadTokenDim, geometry.dim);
  const Tensor keys(form.keys, geometry.kv_heads, tokens, form.layout, geometry.dim);
  std::vector<float> out(static_cast<size_t>(geometry.kv_heads * tokens));
  SaliencyParams params;
  params.queries = queries.view();
  std::vector<int32_t> table;
  SaliencyParams dense_params = params;
  dense_params.keys = dense.view();
  params.keys = keys.view();
  if (form.block_tokens != 0) {
    table = ShuffledBlocks(tokens, form.block_tokens);
    params.keys = keys.paged_view(table, form.block_tokens);
  }
  Threads pool(threads);
  const auto time = [&](const SaliencyParams& of) {
    return Seconds([&] {
      pool.Run([&](ParallelFor parallel) {
        const absl::Status status = backend->Saliency(of, out.data(), nullptr, parallel);
        if (!status.ok()) state.SkipWithError(std::string(status.message()).c_str());
      });
    });
  };
  std::vector<double> seconds;
  std::vector<double> dense_seconds;
  for (auto _ : state) {
    dense_seconds.push_back(time(dense_params));
    seconds.push_back(time(params));
    state.SetIterationTime(seconds.back());
  }
  const auto rows = static_cast<double>(geometry.query_heads * kWindow);
  const double flops = 2.0 * rows * static_cast<double>(tokens * geometry.dim);
  const Arithmetic arithmetic =
      form.queries == DType::kBF16 ? Arithmetic::kBf16Pairs : Arithmetic::kF32;
  double peak = PeakFlops(target, arithmetic, threads, 0.1);
  if (peak == 0) peak = PeakFlops(target, Arithmetic::kF32, threads, 0.1);
  state.counters["share_of_peak"] = flops / Median(seconds) / peak;
  state.counters["times_dense"] = Median(seconds) / Median(dense_seconds);
}

// A tenth of a tensor's rows, all heads alike, into the same form; and between dense bf16 ones.
void Gather(benchmark::State& state, const Form& form) {
  const int threads = static_cast<int>(state.range(0));
  const int64_t tokens = state.range(1);
  const int64_t kept = tokens / 10;
  const std::unique_ptr<Backend> backend = cpu::CreateCpuBackend().value();
  const Tensor dense(DType::kBF16, kKvHeads, tokens, form.layout);
  const Tensor source(form.keys, kKvHeads, tokens, form.layout);
  const int64_t block = form.block_tokens;
  const int64_t padded = block == 0 ? kept : (kept + block - 1) / block * block;
  Tensor dense_out(DType::kBF16, kKvHeads, kept, form.layout);
  Tensor out(form.keys, kKvHeads, padded, form.layout);
  std::vector<int32_t> positions(static_cast<size_t>(kept));
  backend->Select({SaliencyLike(tokens).data(), tokens, kWindow, kept}, positions.data());
  std::vector<int32_t> table;
  TensorView from = source.view();
  MutableTensorView to = out.mutable_view();
  if (block != 0) {
    table = ShuffledBlocks(tokens, block);
    from = source.paged_view(table, block);
    to = MutableTensorView::Paged(out.data(), form.keys, form.layout, kKvHeads, kept, kDim, block);
  }
  Threads pool(threads);
  std::vector<double> seconds;
  std::vector<double> dense_seconds;
  for (auto _ : state) {
    dense_seconds.push_back(Seconds([&] {
      pool.Run([&](ParallelFor parallel) {
        backend->Gather(dense.view(), positions.data(), false, dense_out.mutable_view(), parallel)
            .IgnoreError();
      });
    }));
    seconds.push_back(Seconds([&] {
      pool.Run([&](ParallelFor parallel) {
        backend->Gather(from, positions.data(), false, to, parallel).IgnoreError();
      });
    }));
    state.SetIterationTime(seconds.back());
  }
  const auto bytes =
      static_cast<double>(kKvHeads * kept * kDim) * static_cast<double>(DTypeSize(form.keys));
  state.counters["bytes_per_s"] = bytes / Median(seconds);
  state.counters["times_dense"] = Median(seconds) / Median(dense_seconds);
}

void RegisterSaliency(std::string_view target, const Geometry& geometry, const Form& form) {
  const std::string name =
      "Forms/" + std::string(geometry.name) + "/" + Name(form) + "/" + std::string(target);
  benchmark::RegisterBenchmark(
      name.c_str(), [=](benchmark::State& state) { Saliency(state, target, geometry, form); })
      ->ArgNames({"threads", "tokens"})
      ->ArgsProduct({{1, 2}, {131072}})
      ->Unit(benchmark::kMillisecond)
      ->UseManualTime();
}

}  // namespace

void RegisterForms() {
  constexpr DType kBf16 = DType::kBF16;
  constexpr DType kE4M3 = DType::kF8E4M3;
  for (const std::string_view target : cpu::CpuTargets()) {
    for (const Form& form : {
             Form{kBf16, kE4M3},
             Form{kBf16, DType::kF8E5M2},
             Form{DType::kF16, kE4M3},
             Form{DType::kF32, kE4M3},
             Form{kBf16, kBf16, 16, Layout::kTokenHeadDim},
             Form{kBf16, kBf16, 16},
             Form{kBf16, kBf16, 64, Layout::kTokenHeadDim},
             Form{kBf16, kE4M3, 16, Layout::kTokenHeadDim},
             Form{DType::kF16, DType::kF16, 16, Layout::kTokenHeadDim},
         }) {
      RegisterSaliency(target, kLlama, form);
    }
    for (const Form& form : {Form{}, Form{kBf16, kE4M3}, Form{kBf16, kBf16, 64}}) {
      RegisterSaliency(target, kLatent, form);
    }
  }
  for (const Form& form : {
           Form{kBf16, kE4M3},
           Form{kBf16, kBf16, 16, Layout::kTokenHeadDim},
           Form{kBf16, kBf16, 16},
           Form{kBf16, kE4M3, 16, Layout::kTokenHeadDim},
       }) {
    benchmark::RegisterBenchmark(("GatherForms/" + Name(form)).c_str(),
                                 [=](benchmark::State& state) { Gather(state, form); })
        ->ArgNames({"threads", "tokens"})
        ->ArgsProduct({{1, 2}, {131072}})
        ->Unit(benchmark::kMillisecond)
        ->UseManualTime();
  }
}

}  // namespace structkv::bench
