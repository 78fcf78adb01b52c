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
#include "structkv/v1/piece_codec.h"
#include "tests/bench/wire_bare.h"
#include "tests/bench/wire_peer.h"

namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kLayers = 32;
constexpr uint32_t kKvHeads = 8;

double MicrosSince(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

v1::Open PlanOpen(const PlanCase& plan, uint32_t tokens) {
  v1::Open open;
  open.mutable_geometry()->set_layer_count(kLayers);
  open.mutable_geometry()->set_query_head_count(32);
  open.mutable_geometry()->set_kv_head_count(kKvHeads);
  open.mutable_geometry()->set_key_dim(128);
  open.set_prompt_tokens(tokens);
  open.set_dtype(v1::DTYPE_BF16);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.set_statistic(plan.per_head_statistic ? v1::STATISTIC_SALIENCY_PER_KV_HEAD
                                             : v1::STATISTIC_SALIENCY);
  open.set_output(v1::OUTPUT_PLAN);
  if (plan.per_head_selection) {
    open.mutable_method()->mutable_structkv()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
  }
  return open;
}

std::vector<float> Saliency(size_t count) {
  std::vector<float> saliency(count);
  uint32_t state = 1;
  for (float& value : saliency) {
    state = state * 1664525 + 1013904223;
    value = static_cast<float>(state >> 8) / static_cast<float>(1 << 24);
  }
  return saliency;
}

struct Sample {
  std::vector<double> micros;
  uint64_t request_bytes = 0;
  uint64_t answer_bytes = 0;
};

// One prompt, one layer after the other.
void CompressPrompt(const std::shared_ptr<grpc::Channel>& channel, const v1::Open& open,
                    absl::Span<const std::byte> saliency, uint64_t piece_bytes, Sample* sample) {
  grpc::ClientContext context;
  const auto stream = StartStream(channel, kCompressMethod, &context);
  v1::CompressRequest request;
  *request.mutable_open() = open;
  grpc::ByteBuffer answer;
  if (!stream->Write(wire::Encode(request)) || !stream->Read(&answer)) {
    FinishOrDie(stream.get(), "Compress");
    Die("Compress: not opened");
  }
  const wire::Keepalive owner(saliency.data(), [](const void*) {});
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    sample->request_bytes = 0;
    sample->answer_bytes = 0;
    const Clock::time_point start = Clock::now();
    for (uint64_t at = 0; at < saliency.size(); at += piece_bytes) {
      wire::OutgoingPiece piece;
      piece.owner = owner;
      piece.layer = layer;
      piece.tensor = v1::TENSOR_SALIENCY;
      piece.offset_bytes = at;
      piece.data = saliency.subspan(at, piece_bytes);
      const grpc::ByteBuffer message = wire::EncodeRequest({&piece, 1});
      if (!stream->Write(message)) FinishOrDie(stream.get(), "Compress");
      sample->request_bytes += message.Length();
    }
    bool complete = false;
    while (!complete) {
      if (!stream->Read(&answer)) FinishOrDie(stream.get(), "Compress");
      const absl::StatusOr<wire::Response> response = wire::DecodeResponse(answer);
      if (!response.ok()) Die("Compress: an answer cannot be read");
      complete = response->message.layer().complete();
      if (!response->message.has_pivot()) sample->answer_bytes += answer.Length();
    }
    sample->micros.push_back(MicrosSince(start));
  }
  v1::CompressRequest commit;
  commit.mutable_commit()->set_layer_count(kLayers);
  commit.mutable_commit()->set_input_bytes(kLayers * saliency.size());
  stream->Write(wire::Encode(commit));
  stream->WritesDone();
  while (stream->Read(&answer)) {
  }
  FinishOrDie(stream.get(), "Compress");
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
        small_(session::PlanSession({.spec = spec_}, *backend_).value().small) {}

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
  const v1::Open open = PlanOpen(plan, tokens);
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
    CompressPrompt(channel, open, saliency, piece_bytes, &compress);
    engine.RunPrompt(saliency, &arithmetic);
    BareRoundTrips(bare_channel, kAnswerMethod, compress.request_bytes, compress.answer_bytes,
                   kLayers, /*warm_up=*/0, &bare);
    BareRoundTrips(bare_channel, kEchoMethod, compress.request_bytes, 0, kLayers, /*warm_up=*/0,
                   &echo);
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
