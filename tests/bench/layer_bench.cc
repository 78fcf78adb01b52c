// Seconds that one layer of Llama-3.1-8B takes in the engine, from its tensors to compacted ones:
// saliency, metrics, centrality, selection, gather. By itself, or as the half of pytorch_compare.py
// that waits for its turns. See --help.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <future>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "kernels/backend_registry.h"
#include "nlohmann/json.hpp"
#include "service/engine/prompt.h"
#include "service/engine/scheduler.h"
#include "tests/bench/bench_data.h"

namespace structkv::bench {
namespace {

constexpr int64_t kWindow = 8;
constexpr int64_t kLayers = 32;

struct Flags {
  int64_t tokens = 131072;
  int threads = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  int layers = 20;
  bool turns = false;
  std::string tensors;
  std::string out;
};

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "structkv_layer_bench: %s\n", what.c_str());
  std::exit(1);
}

engine::PromptSpec Spec(int64_t tokens) {
  engine::PromptSpec spec;
  spec.geometry = {.layers = kLayers,
                   .query_heads = kQueryHeads,
                   .kv_heads = kKvHeads,
                   .key_dim = kDim,
                   .value_dim = kDim};
  spec.prompt_tokens = tokens;
  spec.method = method::MethodSpec::Defaults(method::Method::kStructKv);
  return spec;
}

// The same tensors as layer after layer of prompt after prompt.
class LayerBench {
 public:
  explicit LayerBench(const Flags& flags)
      : spec_(Spec(flags.tokens)),
        keys_(DType::kBF16, kKvHeads, flags.tokens),
        values_(DType::kBF16, kKvHeads, flags.tokens),
        queries_(DType::kBF16, kQueryHeads, kWindow),
        backend_(CreateBackend("auto").value()),
        pool_(size_t{1} << 30),
        scheduler_(flags.threads),
        lane_(scheduler_.NewLane()) {
    if (flags.tensors.empty()) return;
    std::ifstream file(flags.tensors, std::ios::binary);
    for (Tensor* tensor : {&keys_, &values_, &queries_}) {
      file.read(reinterpret_cast<char*>(tensor->data()), tensor->bytes());
    }
    if (!file || file.peek() != std::ifstream::traits_type::eof()) {
      Die(flags.tensors + " is not of the size of keys, values and window queries");
    }
  }

  std::string device() const { return backend_->device(); }

  // Seconds from the posting of a layer to its result.
  double RunLayer() {
    if (prompt_ == nullptr || prompt_->done()) {
      prompt_ = std::make_unique<engine::Prompt>(spec_, backend_.get(), &pool_);
      layer_ = 0;
    }
    last_ = engine::LayerOutput();  // its buffers are used again
    engine::LayerInput input;
    input.layer = layer_++;
    input.keys = Borrow(&keys_);
    input.values = Borrow(&values_);
    input.window_queries = Borrow(&queries_);
    absl::StatusOr<engine::LayerOutput> output = absl::InternalError("the layer was not computed");
    std::promise<void> done;
    const double seconds = Seconds([&] {
      scheduler_.Post(lane_, /*small=*/false, [&](ParallelFor parallel) {
        output = prompt_->CompressLayer(std::move(input), parallel);
        done.set_value();
      });
      done.get_future().wait();
    });
    if (!output.ok()) Die(output.status().ToString());
    last_ = *std::move(output);
    return seconds;
  }

  // The last result: positions, int32, then keys and values, [kv_heads, kept, dim] bf16.
  void WriteResult(const std::string& path) const {
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(last_.positions.data()),
               static_cast<std::streamsize>(last_.positions.size() * sizeof(int32_t)));
    for (const engine::Buffer* rows : {&last_.keys, &last_.values}) {
      file.write(reinterpret_cast<const char*>(rows->data()),
                 static_cast<std::streamsize>(rows->size()));
    }
    if (!file.flush()) Die(path + " cannot be written");
  }

 private:
  static engine::Buffer Borrow(Tensor* tensor) {
    return engine::Buffer::Borrowed(tensor->data(), static_cast<size_t>(tensor->bytes()));
  }

  const engine::PromptSpec spec_;
  Tensor keys_;
  Tensor values_;
  Tensor queries_;
  const std::unique_ptr<Backend> backend_;
  engine::BufferPool pool_;
  engine::Scheduler scheduler_;
  const std::shared_ptr<engine::Scheduler::Lane> lane_;
  std::unique_ptr<engine::Prompt> prompt_;
  engine::LayerOutput last_;
  int64_t layer_ = 0;
};

nlohmann::json Run(LayerBench* bench, int layers) {
  std::vector<double> seconds;
  for (int i = 0; i < layers; ++i) seconds.push_back(bench->RunLayer());
  return {{"seconds", seconds}};
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("Measures one layer of Llama-3.1-8B, bf16, through the engine; prints JSON",
               "structkv_layer_bench");
  app.add_option("--tokens", flags.tokens, "Prompt length")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--threads", flags.threads, "Compute threads")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--layers", flags.layers, "Layers to compute")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_flag("--turns", flags.turns,
               "Read numbers of layers from standard input, a line each, and answer each in turn");
  app.add_option("--tensors", flags.tensors,
                 "File of keys, values and 8 rows of window queries, raw; default: random ones");
  app.add_option("--out", flags.out, "Write the last layer's positions, keys and values, raw");
  CLI11_PARSE(app, argc, argv);
  LayerBench bench(flags);
  bench.RunLayer();  // touches the pages of the results
  if (!flags.turns) {
    nlohmann::json report = Run(&bench, flags.layers);
    std::vector<double> seconds = report["seconds"];
    std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
    report["median_seconds"] = seconds[seconds.size() / 2];
    report["device"] = bench.device();
    report["threads"] = flags.threads;
    report["tokens"] = flags.tokens;
    std::cout << report.dump(2) << std::endl;
  } else {
    std::cout << nlohmann::json({{"device", bench.device()}}).dump() << std::endl;
    int layers = 0;
    while (std::cin >> layers) std::cout << Run(&bench, layers).dump() << std::endl;
  }
  if (!flags.out.empty()) bench.WriteResult(flags.out);
  return 0;
}

}  // namespace
}  // namespace structkv::bench

int main(int argc, char** argv) { return structkv::bench::Main(argc, argv); }
