#include "service/admin/metrics.h"

#include <chrono>
#include <memory>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/engine/nonfinite.h"

namespace structkv::admin {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

rpc::PromptReport Prompt() {
  rpc::PromptReport prompt;
  prompt.id = "0123";
  prompt.method = "structkv";
  prompt.transport = "inline";
  prompt.wished_transport = "shared_memory";
  prompt.prompt_tokens = 100;
  prompt.layers = 4;
  prompt.input_bytes = 1000;
  prompt.output_bytes = 100;
  prompt.micros = 2'000'000;
  auto picture = std::make_shared<rpc::PromptPicture>(100);
  engine::LayerOutput output;
  output.kept_tokens = 10;
  for (int32_t i = 0; i < 10; ++i) output.positions.push_back(i);
  picture->Add(output);
  engine::PivotResult pivot;
  pivot.decision.pivot_layer = 2;
  picture->Add(pivot);
  prompt.picture = picture;
  return prompt;
}

TEST(MetricsTest, CountsPrompts) {
  Metrics metrics;
  metrics.CountPrompt(Prompt(), absl::OkStatus());
  metrics.CountPrompt(Prompt(), absl::AbortedError("slow"));
  EXPECT_THAT(
      metrics.Render({}),
      AllOf(HasSubstr("structkv_sessions_total{result=\"ok\"} 1\n"),
            HasSubstr("structkv_sessions_total{result=\"aborted\"} 1\n"),
            HasSubstr("structkv_input_bytes_total{transport=\"inline\"} 2000\n"),
            HasSubstr("structkv_output_bytes_total{transport=\"inline\"} 200\n"),
            HasSubstr("structkv_transport_fallback_total{from=\"shared_memory\",to=\"inline\"} 2"),
            HasSubstr("structkv_session_duration_seconds_sum 4\n"),
            // Of what ended well alone.
            HasSubstr("structkv_compression_ratio_sum 0.1"),
            HasSubstr("structkv_compression_ratio_count 1\n"),
            HasSubstr("structkv_pivot_depth_ratio_sum 0.5\n"),
            Not(ContainsRegex("structkv_rejected_total\\{[^\n]*\\} [1-9]")),
            Not(HasSubstr("0123"))));
}

// Else rate() and increase() would not see the first of each.
TEST(MetricsTest, SeriesAreThereBeforeTheyCount) {
  Metrics metrics;
  EXPECT_THAT(
      metrics.Render({}),
      AllOf(HasSubstr("structkv_sessions_total{result=\"ok\"} 0\n"),
            HasSubstr("structkv_sessions_total{result=\"unavailable\"} 0\n"),
            HasSubstr("structkv_rejected_total{reason=\"resource_exhausted\"} 0\n"),
            HasSubstr("structkv_fetches_total{result=\"not_found\"} 0\n"),
            HasSubstr("structkv_input_bytes_total{transport=\"nccl\"} 0\n"),
            HasSubstr("structkv_output_bytes_total{transport=\"inline\"} 0\n"),
            HasSubstr("structkv_transport_fallback_total{from=\"cuda_ipc\",to=\"inline\"} 0\n"),
            Not(HasSubstr("structkv_rejected_total{reason=\"ok\"}")),
            Not(HasSubstr("from=\"inline\",to=\"inline\""))));
}

TEST(MetricsTest, CountsRefusals) {
  Metrics metrics;
  metrics.CountPrompt({}, absl::ResourceExhaustedError("full"));
  rpc::PromptReport limited;
  limited.refused_by = "tenant_memory";
  metrics.CountPrompt(limited, absl::ResourceExhaustedError("full"));
  EXPECT_THAT(metrics.Render({}),
              AllOf(HasSubstr("structkv_sessions_total{result=\"resource_exhausted\"} 2\n"),
                    HasSubstr("structkv_rejected_total{reason=\"resource_exhausted\"} 1\n"),
                    HasSubstr("structkv_rejected_total{reason=\"tenant_memory\"} 1\n"),
                    HasSubstr("structkv_session_duration_seconds_count 0\n"),
                    Not(ContainsRegex("structkv_input_bytes_total\\{[^\n]*\\} [1-9]"))));
}

TEST(MetricsTest, CountsLayersAndFetches) {
  Metrics metrics;
  metrics.CountLayer("snapkv",
                     {.queued = absl::Milliseconds(3), .computed = absl::Milliseconds(20)});
  metrics.CountFetch({.transport = "cuda_ipc", .output_bytes = 7}, absl::OkStatus());
  EXPECT_THAT(
      metrics.Render({}),
      AllOf(HasSubstr("structkv_layers_total{method=\"snapkv\",result=\"ok\"} 1\n"),
            HasSubstr("structkv_nonfinite_values_total 0\n"),
            HasSubstr("structkv_layer_compress_duration_seconds_sum{method=\"snapkv\"} 0.02\n"),
            HasSubstr("structkv_queue_wait_seconds_bucket{le=\"0.0025\"} 0\n"),
            HasSubstr("structkv_queue_wait_seconds_bucket{le=\"0.005\"} 1\n"),
            HasSubstr("structkv_fetches_total{result=\"ok\"} 1\n"),
            HasSubstr("structkv_output_bytes_total{transport=\"cuda_ipc\"} 7\n")));
}

TEST(MetricsTest, CountsLayersThatFailed) {
  Metrics metrics;
  const absl::Status bad = absl::InvalidArgumentError("layer 1: saliency of token 3 is nan");
  metrics.CountLayer("h2o", {.status = engine::MarkNonFinite(bad)});
  metrics.CountLayer("h2o", {.status = bad});
  EXPECT_THAT(
      metrics.Render({}),
      AllOf(HasSubstr("structkv_layers_total{method=\"h2o\",result=\"invalid_argument\"} 2\n"),
            HasSubstr("structkv_nonfinite_values_total 1\n")));
}

// A stage that a layer did not have is not one of no time.
TEST(MetricsTest, StagesOfLayers) {
  Metrics metrics;
  session::LayerTiming layer;
  layer.stages.Add(engine::Stage::kSaliency, std::chrono::milliseconds(4));
  layer.stages.Add(engine::Stage::kGather, std::chrono::milliseconds(1));
  layer.stages.Add(engine::Stage::kGather, std::chrono::milliseconds(1));
  metrics.CountLayer("structkv", layer);
  EXPECT_THAT(metrics.Render({}),
              AllOf(HasSubstr("structkv_stage_duration_seconds_sum{stage=\"saliency\"} 0.004\n"),
                    HasSubstr("structkv_stage_duration_seconds_sum{stage=\"gather\"} 0.002\n"),
                    HasSubstr("structkv_stage_duration_seconds_count{stage=\"gather\"} 1\n"),
                    Not(HasSubstr("stage=\"centrality\""))));
}

// What is read anew each time: gauges follow, counters rise.
TEST(MetricsTest, Readings) {
  Metrics metrics;
  Readings readings = {
      .version = "1.2.3", .revision = "017fc43", .backend = "cpu", .active_prompts = 5};
  readings.pools["prompts"] = {.reserved_bytes = 10, .limit_bytes = 20};
  readings.held_caches_expired = 3;
  readings.ipc_handles = 2;
  readings.connections = 6;
  readings.connections_refused = 9;
  readings.connections_broken = 4;
  readings.streams_refused = {.connection = 7, .unix_sockets = 8};
  readings.nccl_aborts = 1;
  readings.cuda_errors["cudaErrorLaunchFailure"] = 1;
  EXPECT_THAT(
      metrics.Render(readings),
      AllOf(HasSubstr(
                "structkv_build_info{backend=\"cpu\",revision=\"017fc43\",version=\"1.2.3\"} 1\n"),
            HasSubstr("structkv_sessions_active 5\n"),
            HasSubstr("structkv_memory_reserved_bytes{pool=\"prompts\"} 10\n"),
            HasSubstr("structkv_memory_limit_bytes{pool=\"prompts\"} 20\n"),
            HasSubstr("structkv_leases_expired_total{kind=\"held_cache\"} 3\n"),
            HasSubstr("structkv_connections 6\n"),
            HasSubstr("structkv_connections_refused_total 9\n"),
            HasSubstr("structkv_connections_broken_total 4\n"),
            HasSubstr("structkv_streams_refused_total{reason=\"connection\"} 7\n"),
            HasSubstr("structkv_streams_refused_total{reason=\"unix_sockets\"} 8\n"),
            HasSubstr("structkv_ipc_handles_open 2\n"), HasSubstr("structkv_nccl_aborts_total 1\n"),
            HasSubstr("structkv_cuda_errors_total{kind=\"cudaErrorLaunchFailure\"} 1\n"),
            Not(HasSubstr("structkv_trace_spans_total{")), HasSubstr("structkv_draining 0\n")));
  readings.active_prompts = 1;
  readings.connections = 2;
  readings.connections_refused = 10;
  readings.held_caches_expired = 4;
  readings.draining = true;
  readings.nccl_aborts = 5;
  readings.spans = {.exported = 7, .dropped = 1};
  EXPECT_THAT(
      metrics.Render(readings),
      AllOf(HasSubstr("structkv_sessions_active 1\n"), HasSubstr("structkv_connections 2\n"),
            HasSubstr("structkv_connections_refused_total 10\n"),
            HasSubstr("structkv_leases_expired_total{kind=\"held_cache\"} 4\n"),
            HasSubstr("structkv_nccl_aborts_total 5\n"),
            HasSubstr("structkv_trace_spans_total{result=\"exported\"} 7\n"),
            HasSubstr("structkv_trace_spans_total{result=\"dropped\"} 1\n"),
            HasSubstr("structkv_trace_spans_total{result=\"failed\"} 0\n"),
            HasSubstr("structkv_draining 1\n")));
}

}  // namespace
}  // namespace structkv::admin
