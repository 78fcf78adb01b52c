#include "tests/bench/wire_plan.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <future>
#include <memory>
#include <thread>
#include <utility>

#include "kernels/backend_registry.h"
#include "service/engine/prompt.h"
#include "service/engine/scheduler.h"
#include "service/rpc/open_decoder.h"
#include "service/session/session_plan.h"
#include "structkv/v1/compression.pb.h"
#include "tests/bench/wire_bare.h"
#include "tests/bench/wire_peer.h"
#include "tests/bench/wire_prompt.h"

namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kLayers = 32;
constexpr uint32_t kKvHeads = 8;

v1::Open OpenOf(const PlanCase& plan, uint32_t tokens) {
  v1::Open open = PlanOpen(kLayers, tokens);
  if (plan.per_head_statistic) open.set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
  if (plan.per_head_selection) {
    open.mutable_method()->mutable_structkv()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
  }
  return open;
}

// The engine as a server has it.
class Engine {
 public:
  explicit Engine(const v1::Open& open)
      : backend_(CreateBackend("auto").value()),
        pool_(size_t{256} << 20),
        scheduler_(static_cast<int>(std::max(1U, std::thread::hardware_concurrency()))),
        lane_(scheduler_.NewLane()),
        spec_(rpc::DecodeOpen(open, rpc::kDefaultMessageBytes).value().spec),
        small_(session::PlanSession({.spec = spec_}, *backend_).value().layer_size ==
               session::LayerSize::kSmall) {}

  void RunPrompt(absl::Span<const std::byte> saliency, std::vector<double>* micros) {
    engine::Prompt prompt(spec_, backend_.get(), &pool_);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      engine::LayerInput input;
      input.layer = layer;
      input.saliency = pool_.Acquire(saliency.size());
      std::memcpy(input.saliency.data(), saliency.data(), saliency.size());
      std::promise<void> done;
      double elapsed = 0;
      scheduler_.Post(lane_, small_, [&](ParallelFor parallel) {
        const Clock::time_point start = Clock::now();
        const absl::StatusOr<engine::LayerOutput> output =
            prompt.CompressLayer(std::move(input), parallel);
        const std::optional<engine::PivotResult> pivot = prompt.TakePivot();
        elapsed = MicrosSince(start);
        if (!output.ok() || pivot.has_value() != (layer == kLayers - 1)) Die("the engine failed");
        done.set_value();
      });
      done.get_future().wait();
      micros->push_back(elapsed);
    }
  }

 private:
  const std::unique_ptr<Backend> backend_;
  engine::BufferPool pool_;
  engine::Scheduler scheduler_;
  const std::shared_ptr<engine::Scheduler::Lane> lane_;
  const engine::PromptSpec spec_;
  const bool small_;
};

}  // namespace

const std::vector<PlanCase>& PlanCases() {
  static const auto* const cases = new std::vector<PlanCase>{
      {"[N] in, [kept] out", false, false},
      {"[8, N] in, [kept] out", true, false},
      {"[8, N] in, [8, kept] out", true, true},
  };
  return *cases;
}

PlanTimes MeasurePlan(const PlanCase& plan, const std::string& bare_address,
                      const std::string& address, uint32_t tokens, int prompts,
                      uint64_t piece_bytes) {
  const auto bare_channel = Connect(bare_address);
  const auto channel = Connect(address);
  const v1::Open open = OpenOf(plan, tokens);
  const std::vector<float> values =
      Saliency(size_t{tokens} * (plan.per_head_statistic ? kKvHeads : 1));
  const auto saliency = absl::MakeConstSpan(reinterpret_cast<const std::byte*>(values.data()),
                                            values.size() * sizeof(float));
  Engine engine(open);
  Sample compress;
  std::vector<double> arithmetic;
  std::vector<double> bare;
  std::vector<double> echo;
  for (int i = 0; i <= prompts; ++i) {
    if (i == 1) {  // the first one warmed everything up
      compress = {};
      arithmetic = bare = echo = {};
    }
    CompressPrompt(channel, open, saliency, piece_bytes, /*warm_up=*/0, &compress);
    engine.RunPrompt(saliency, &arithmetic);
    BareRoundTrips(bare_channel, kAnswerMethod, compress.request_bytes, compress.answer_bytes,
                   /*arithmetic_tokens=*/0, kLayers, /*warm_up=*/0, &bare);
    BareRoundTrips(bare_channel, kEchoMethod, compress.request_bytes, 0, /*arithmetic_tokens=*/0,
                   kLayers, /*warm_up=*/0, &echo);
  }
  PlanTimes times;
  times.compress = Summarise(std::move(compress.micros));
  times.arithmetic = Summarise(std::move(arithmetic));
  times.bare = Summarise(std::move(bare));
  times.echo = Summarise(std::move(echo));
  times.request_bytes = compress.request_bytes;
  times.answer_bytes = compress.answer_bytes;
  return times;
}

}  // namespace structkv::bench
