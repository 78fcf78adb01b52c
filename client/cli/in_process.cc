#include "client/cli/in_process.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <thread>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "client/cli/method_flags.h"
#include "client/cpp/bytes_pool.h"
#include "client/cpp/row_gather.h"
#include "kernels/backend_registry.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/prompt.h"
#include "service/engine/scheduler.h"
#include "service/rpc/open_decoder.h"
#include "service/session/pivot_profile.h"

namespace structkv::cli {
namespace {

// There are no messages here; any limit that the decoder accepts will do.
constexpr int64_t kMessageBytes = int64_t{64} << 20;
constexpr size_t kIdleBufferBytes = size_t{1} << 30;

uint64_t Micros(absl::Duration duration) {
  return static_cast<uint64_t>(absl::ToInt64Microseconds(duration));
}

// One prompt's way through the engine.
class LocalPrompt {
 public:
  LocalPrompt(const v1::Open& open, engine::PromptSpec spec, const Backend* backend,
              engine::BufferPool* pool, engine::Scheduler* scheduler,
              const client::SessionOptions& options)
      : open_(open),
        options_(options),
        pool_(pool),
        scheduler_(scheduler),
        lane_(scheduler->NewLane()),
        prompt_(std::move(spec), backend, pool) {}

  absl::Status RunLayer(uint32_t layer, const client::LayerTensors& tensors);

  v1::Summary* summary() { return &summary_; }
  std::optional<int64_t> ExactPivot() const { return prompt_.ExactPivot(); }

 private:
  absl::StatusOr<engine::Buffer> Input(uint32_t layer, engine::InputTensor tensor,
                                       absl::Span<const std::byte> data, bool skeleton,
                                       bool borrowed);
  // Puts the rows that are pulled into the answer; returns what keeps them alive.
  absl::StatusOr<std::shared_ptr<const void>> PullRows(const client::LayerTensors& tensors,
                                                       engine::LayerOutput* output);
  client::Bytes Output(engine::Buffer buffer, const std::shared_ptr<const void>& source);
  void Deliver(engine::LayerOutput output, const std::shared_ptr<const void>& source);
  void Deliver(engine::PivotResult pivot);

  const v1::Open& open_;
  const client::SessionOptions& options_;
  client::internal::BytesPool rows_{size_t{64} << 20};
  engine::BufferPool* const pool_;
  engine::Scheduler* const scheduler_;
  const std::shared_ptr<engine::Scheduler::Lane> lane_;
  engine::Prompt prompt_;
  v1::Summary summary_;
};

absl::StatusOr<engine::Buffer> LocalPrompt::Input(uint32_t layer, engine::InputTensor tensor,
                                                  absl::Span<const std::byte> data, bool skeleton,
                                                  bool borrowed) {
  const engine::PromptSpec& spec = prompt_.spec();
  const int64_t expected = !spec.has_input(layer) ? 0
                           : skeleton             ? spec.SkeletonInputBytes(tensor)
                                                  : spec.InputBytes(tensor);
  if (static_cast<int64_t>(data.size()) < expected) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer, ": ", std::string(engine::InputTensorName(tensor)), " has ",
                     data.size(), " bytes, expected are ", expected));
  }
  if (expected == 0) return engine::Buffer();
  const auto size = static_cast<size_t>(expected);
  summary_.set_input_bytes(summary_.input_bytes() + size);
  // The engine reads its input, and hands it on unchanged at most.
  if (borrowed) return engine::Buffer::Borrowed(const_cast<std::byte*>(data.data()), size);
  engine::Buffer copy = pool_->Acquire(size);
  std::memcpy(copy.data(), data.data(), size);
  return copy;
}

absl::Status LocalPrompt::RunLayer(uint32_t layer, const client::LayerTensors& tensors) {
  engine::LayerInput input;
  input.layer = layer;
  input.positions = tensors.positions;
  summary_.set_input_bytes(summary_.input_bytes() + tensors.positions.size() * sizeof(int32_t));
  const struct {
    engine::InputTensor tensor;
    absl::Span<const std::byte> data;
    engine::Buffer* out;
  } inputs[] = {
      {engine::InputTensor::kKeys, tensors.keys, &input.keys},
      {engine::InputTensor::kValues, tensors.values, &input.values},
      {engine::InputTensor::kWindowQueries, tensors.window_queries, &input.window_queries},
      {engine::InputTensor::kWindowLse, tensors.window_lse, &input.window_lse},
      {engine::InputTensor::kSaliency, tensors.saliency, &input.saliency},
      {engine::InputTensor::kKeyScales, tensors.key_scales, &input.key_scales},
      {engine::InputTensor::kValueScales, tensors.value_scales, &input.value_scales},
  };
  for (const auto& [tensor, data, out] : inputs) {
    absl::StatusOr<engine::Buffer> buffer =
        Input(layer, tensor, data, /*skeleton=*/!tensors.positions.empty(),
              /*borrowed=*/tensors.owner != nullptr);
    if (!buffer.ok()) return buffer.status();
    *out = *std::move(buffer);
  }
  absl::StatusOr<engine::LayerOutput> output = absl::InternalError("the layer was not computed");
  absl::Notification computed;
  const absl::Time posted = absl::Now();
  absl::Time begun;
  scheduler_->Post(lane_, /*small=*/false, [&](ParallelFor parallel) {
    begun = absl::Now();
    output = prompt_.CompressLayer(std::move(input), parallel);
    computed.Notify();
  });
  computed.WaitForNotification();
  v1::Timing& timing = *summary_.mutable_timing();
  timing.set_queue_micros(timing.queue_micros() + Micros(begun - posted));
  timing.set_compute_micros(timing.compute_micros() + Micros(absl::Now() - begun));
  if (!output.ok()) return output.status();
  if (std::optional<engine::PivotResult> pivot = prompt_.TakePivot()) Deliver(*std::move(pivot));
  std::shared_ptr<const void> source = tensors.owner;
  if (prompt_.spec().pull != engine::Pull::kNone) {
    absl::StatusOr<std::shared_ptr<const void>> pulled = PullRows(tensors, &*output);
    if (!pulled.ok()) return pulled.status();
    source = *std::move(pulled);
  }
  Deliver(*std::move(output), source);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const void>> LocalPrompt::PullRows(
    const client::LayerTensors& tensors, engine::LayerOutput* output) {
  client::RowPull pull;
  pull.layer = static_cast<uint32_t>(output->layer);
  pull.kept_tokens = static_cast<uint32_t>(output->kept_tokens);
  pull.keys = prompt_.spec().pulls(engine::InputTensor::kKeys);
  const auto positions = std::make_shared<std::vector<int32_t>>(output->positions);
  pull.positions = {reinterpret_cast<std::byte*>(positions->data()),
                    positions->size() * sizeof(int32_t), positions};
  summary_.set_output_bytes(summary_.output_bytes() + pull.positions.size());
  absl::StatusOr<client::PulledRows> rows =
      options_.rows ? options_.rows(pull)
                    : client::internal::GatherPulledRows(
                          open_, tensors, tensors.positions, pull,
                          [this](size_t size) -> absl::StatusOr<client::Bytes> {
                            return rows_.Acquire(size);
                          });
  if (!rows.ok()) return rows.status();
  const auto take = [&](absl::Span<const std::byte> data) {
    summary_.set_input_bytes(summary_.input_bytes() + data.size());
    if (rows->owner != nullptr) {
      return engine::Buffer::Borrowed(const_cast<std::byte*>(data.data()), data.size());
    }
    engine::Buffer copy = pool_->Acquire(data.size());
    if (!data.empty()) std::memcpy(copy.data(), data.data(), data.size());
    return copy;
  };
  absl::Status taken = engine::TakeRows(
      prompt_.spec(), *pool_, {.keys = take(rows->keys), .values = take(rows->values)}, output);
  if (!taken.ok()) return taken;
  using Owners = std::pair<std::shared_ptr<const void>, std::shared_ptr<const void>>;
  return std::make_shared<const Owners>(tensors.owner, rows->owner);
}

client::Bytes LocalPrompt::Output(engine::Buffer buffer,
                                  const std::shared_ptr<const void>& source) {
  if (buffer.empty()) return {};
  summary_.set_output_bytes(summary_.output_bytes() + buffer.size());
  // What passes through uncopied lives in the source's memory.
  struct Owner {
    engine::Buffer buffer;
    std::shared_ptr<const void> source;
  };
  auto owner = std::make_shared<Owner>(Owner{std::move(buffer), source});
  return {owner->buffer.data(), owner->buffer.size(), owner};
}

void LocalPrompt::Deliver(engine::LayerOutput output, const std::shared_ptr<const void>& source) {
  client::LayerResult result;
  result.layer = static_cast<uint32_t>(output.layer);
  result.kept_tokens = static_cast<uint32_t>(output.kept_tokens);
  result.kept_blocks = static_cast<uint32_t>(output.kept_blocks);
  if (output.metrics.has_value()) {
    result.metrics = rpc::EncodeMetrics(output.layer, *output.metrics);
  }
  auto positions = std::make_shared<std::vector<int32_t>>(std::move(output.positions));
  result.positions = {reinterpret_cast<std::byte*>(positions->data()),
                      positions->size() * sizeof(int32_t), positions};
  summary_.set_output_bytes(summary_.output_bytes() + result.positions.size());
  result.keys = Output(std::move(output.keys), source);
  result.values = Output(std::move(output.values), source);
  result.key_scales = Output(std::move(output.key_scales), source);
  result.value_scales = Output(std::move(output.value_scales), source);
  result.saliency = Output(std::move(output.saliency), source);
  summary_.set_layer_count(summary_.layer_count() + 1);
  options_.on_event(client::Event(std::move(result)));
}

void LocalPrompt::Deliver(engine::PivotResult pivot) {
  const v1::PivotDecision decision = rpc::EncodePivot(pivot.decision);
  client::PivotResult result;
  result.pivot_layer = decision.pivot_layer();
  if (decision.has_transition_layer()) result.transition_layer = decision.transition_layer();
  result.mode = decision.mode();
  result.decided_at_layer = decision.decided_at_layer();
  if (decision.has_skeleton_from_layer()) {
    result.skeleton_from_layer = decision.skeleton_from_layer();
  }
  result.profiled_prompts = decision.profiled_prompts();
  result.layers.assign(decision.layers().begin(), decision.layers().end());
  result.skeleton = std::move(pivot.skeleton);
  result.centrality = std::move(pivot.centrality);
  summary_.set_output_bytes(summary_.output_bytes() + result.skeleton.size() * sizeof(int32_t) +
                            result.centrality.size() * sizeof(float));
  options_.on_event(client::Event(std::move(result)));
}

class InProcessCompressor final : public Compressor {
 public:
  InProcessCompressor(std::unique_ptr<Backend> backend, int threads)
      : backend_(std::move(backend)), pool_(kIdleBufferBytes), scheduler_(threads) {}

  absl::StatusOr<v1::Summary> Run(const v1::Open& open, client::LayerSource source,
                                  const client::SessionOptions& options) override;
  absl::StatusOr<v1::Summary> RunInSteps(const v1::Open& open, client::SteppedSource source,
                                         const client::SessionOptions& options) override;
  std::vector<absl::StatusOr<v1::Summary>> RunBatch(absl::Span<const client::BatchPrompt> prompts,
                                                    client::BatchSource source,
                                                    const client::StreamOptions& options) override;
  absl::StatusOr<v1::GetCapabilitiesResponse> GetCapabilities() override;
  std::string description() const override {
    return absl::StrCat("in process, ", scheduler_.threads(), " threads, ", backend_->device());
  }

 private:
  const std::unique_ptr<Backend> backend_;
  engine::BufferPool pool_;
  engine::Scheduler scheduler_;
  // Without a file nothing can fail.
  const std::shared_ptr<session::PivotProfile> profile_ = *session::PivotProfile::Open({});
};

absl::StatusOr<v1::Summary> InProcessCompressor::Run(const v1::Open& open,
                                                     client::LayerSource source,
                                                     const client::SessionOptions& options) {
  if (!options.on_event) {
    return absl::InvalidArgumentError("SessionOptions.on_event is not set");
  }
  absl::StatusOr<rpc::OpenRequest> request = rpc::DecodeOpen(open, kMessageBytes);
  if (!request.ok()) return request.status();
  if (request->shard.has_value() && request->shard->shard_count > 1) {
    return absl::InvalidArgumentError("a prompt of several ranks needs a server");
  }
  engine::PromptSpec& spec = request->spec;
  absl::Status status =
      engine::ValidateSpec(spec, engine::PromptLimits(), backend_->capabilities());
  if (!status.ok()) return status;
  profile_->Resolve(&spec);
  const engine::MemoryPlan plan = engine::PlanMemory(spec, *backend_);
  v1::Opened opened = rpc::EncodeOpened(spec);
  opened.set_session_id("in-process");
  opened.set_reserved_bytes(static_cast<uint64_t>(plan.layer_input_bytes + plan.layer_output_bytes +
                                                  plan.state_bytes + plan.scratch_bytes));
  opened.set_layers_in_flight(1);
  opened.set_backend(std::string(backend_->name()));
  if (options.on_opened) options.on_opened(opened);

  const absl::Time start = absl::Now();
  LocalPrompt prompt(open, spec, backend_.get(), &pool_, &scheduler_, options);
  for (uint32_t layer = 0; layer < open.geometry().layer_count(); ++layer) {
    if (absl::Now() - start > options.timeout) {
      return absl::DeadlineExceededError(absl::StrCat("layer ", layer, " was reached after ",
                                                      absl::FormatDuration(options.timeout)));
    }
    absl::StatusOr<client::LayerTensors> tensors = client::LayerTensors();
    if (spec.has_input(layer)) tensors = source(layer);
    if (!tensors.ok()) return tensors.status();
    status = prompt.RunLayer(layer, *tensors);
    if (!status.ok()) return status;
  }
  if (const std::optional<int64_t> exact = prompt.ExactPivot()) profile_->Record(spec, *exact);
  v1::Summary& summary = *prompt.summary();
  summary.set_logical_length(open.prompt_tokens());
  summary.set_kv_length(static_cast<uint32_t>(spec.largest_kept_tokens()));
  summary.set_next_position(static_cast<uint32_t>(spec.next_position()));
  summary.set_fingerprint(opened.fingerprint());
  summary.set_backend(opened.backend());
  summary.set_transport("in-process");
  summary.set_kv_blocks(static_cast<uint32_t>(spec.kv_blocks()));
  summary.set_values_in_keys(spec.geometry.values_in_keys);
  summary.mutable_timing()->set_session_micros(Micros(absl::Now() - start));
  options.on_event(client::Event(summary));
  return summary;
}

std::vector<absl::StatusOr<v1::Summary>> InProcessCompressor::RunBatch(
    absl::Span<const client::BatchPrompt> prompts, client::BatchSource /*source*/,
    const client::StreamOptions& /*options*/) {
  return {prompts.size(), absl::InvalidArgumentError("prompts that share a stream need a server")};
}

// Here a layer's events come while it is handed over.
absl::StatusOr<v1::Summary> InProcessCompressor::RunInSteps(const v1::Open& open,
                                                            client::SteppedSource source,
                                                            const client::SessionOptions& options) {
  std::optional<client::PivotResult> pivot;
  client::SessionOptions stepped = options;
  stepped.on_event = [&](client::Event event) {
    if (const auto* decided = std::get_if<client::PivotResult>(&event)) pivot = *decided;
    if (options.on_event) options.on_event(std::move(event));
  };
  return Run(
      open, [&](uint32_t layer) { return source(layer, pivot.has_value() ? &*pivot : nullptr); },
      stepped);
}

absl::StatusOr<v1::GetCapabilitiesResponse> InProcessCompressor::GetCapabilities() {
  const BackendCapabilities& capabilities = backend_->capabilities();
  v1::GetCapabilitiesResponse response;
  response.set_version(STRUCTKV_VERSION);
  v1::BackendInfo* info = response.add_backends();
  info->set_name(std::string(backend_->name()));
  info->add_devices(backend_->device());
  for (DType dtype : capabilities.dtypes) {
    response.add_dtypes(rpc::EncodeDType(dtype));
  }
  for (Layout layout : capabilities.layouts) {
    response.add_layouts(layout == Layout::kHeadTokenDim ? v1::LAYOUT_HEAD_TOKEN_DIM
                                                         : v1::LAYOUT_TOKEN_HEAD_DIM);
  }
  for (const std::string& name : MethodNames()) response.add_methods(name);
  for (v1::Statistic statistic : {v1::STATISTIC_NONE, v1::STATISTIC_WINDOW_QUERIES,
                                  v1::STATISTIC_SALIENCY, v1::STATISTIC_SALIENCY_PER_KV_HEAD}) {
    response.add_statistics(statistic);
  }
  for (v1::PivotMode mode : {v1::PIVOT_MODE_EXACT, v1::PIVOT_MODE_FIXED, v1::PIVOT_MODE_ONLINE,
                             v1::PIVOT_MODE_PROFILED}) {
    response.add_pivot_modes(mode);
  }
  for (v1::RopeType type : {v1::ROPE_TYPE_DEFAULT, v1::ROPE_TYPE_LINEAR, v1::ROPE_TYPE_DYNAMIC,
                            v1::ROPE_TYPE_YARN, v1::ROPE_TYPE_LLAMA3}) {
    response.add_rope_types(type);
  }
  response.add_transports("in-process");
  v1::DimRange& dims = *response.mutable_key_dims();
  dims.set_min(static_cast<uint32_t>(capabilities.min_dim));
  dims.set_max(static_cast<uint32_t>(capabilities.max_dim));
  dims.set_step(static_cast<uint32_t>(capabilities.dim_step));
  for (int64_t extra : capabilities.extra_dims) dims.add_extra(static_cast<uint32_t>(extra));
  if (capabilities.paged) {
    v1::DimRange& blocks = *response.mutable_block_tokens();
    blocks.set_min(static_cast<uint32_t>(engine::kBlockTokensStep));
    blocks.set_max(static_cast<uint32_t>(engine::kMaxBlockTokens));
    blocks.set_step(static_cast<uint32_t>(engine::kBlockTokensStep));
  }
  const engine::PromptLimits limits;
  v1::Limits& out = *response.mutable_limits();
  out.set_max_prompt_tokens(static_cast<uint32_t>(limits.max_prompt_tokens));
  out.set_max_layers(static_cast<uint32_t>(limits.max_layers));
  out.set_max_heads(static_cast<uint32_t>(limits.max_heads));
  out.set_max_window_tokens(
      static_cast<uint32_t>(std::min(limits.max_window, capabilities.max_window)));
  return response;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Compressor>> MakeInProcessCompressor(const std::string& backend,
                                                                    int threads) {
  absl::StatusOr<std::unique_ptr<Backend>> made = CreateBackend(backend);
  if (!made.ok()) return made.status();
  if (threads == 0) threads = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  return std::make_unique<InProcessCompressor>(*std::move(made), threads);
}

}  // namespace structkv::cli
