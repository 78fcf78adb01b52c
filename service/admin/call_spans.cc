#include "service/admin/call_spans.h"

#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace structkv::admin {
namespace {

using trace::Attribute;
using trace::Span;
using trace::SpanKind;

std::string Text(std::string_view text) { return std::string(text); }

// Those that OpenTelemetry's conventions for gRPC call a server's errors; others are its callers'.
bool IsServersFault(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDataLoss:
      return true;
    default:
      return false;
  }
}

std::string ErrorText(const absl::Status& status) {
  return absl::StrCat(absl::StatusCodeToString(status.code()), ": ", status.message());
}

// The span of the call itself, without what its end has beside the status.
Span CallSpanOf(const rpc::CallLabels& call, const char* service, const char* method,
                int64_t micros, const absl::Status& status) {
  Span span = {.trace = call.span->trace,
               .id = call.span->id,
               .parent = call.span->parent,
               .trace_state = call.span->trace_state,
               .name = absl::StrCat(service, "/", method),
               .kind = SpanKind::kServer,
               .begin = call.span->begin,
               .end = call.span->begin + absl::Microseconds(micros)};
  span.attributes = {{"rpc.system", "grpc"},
                     {"rpc.service", service},
                     {"rpc.method", method},
                     {"rpc.grpc.status_code", static_cast<int64_t>(status.code())}};
  if (!call.session_id.empty()) {
    span.attributes.emplace_back("structkv.client_session", call.session_id);
  }
  if (IsServersFault(status.code())) span.error = ErrorText(status);
  return span;
}

Span Child(const rpc::CallLabels& call, const trace::SpanId& parent, std::string name) {
  return {.trace = call.span->trace,
          .id = trace::NewSpanId(),
          .parent = parent,
          .trace_state = call.span->trace_state,
          .name = std::move(name)};
}

Span LayerSpan(const rpc::PromptReport& prompt, const trace::SpanId& parent,
               const session::LayerTiming& layer) {
  Span span = Child(prompt.call, parent, "layer");
  const absl::Time begun = prompt.timeline->TimeOf(layer.begun);
  span.begin = begun - layer.queued;
  span.end = begun + layer.computed;
  span.attributes = {{"structkv.layer", layer.layer},
                     {"structkv.queued_micros", absl::ToInt64Microseconds(layer.queued)}};
  for (const engine::Stage stage : engine::kStages) {
    const absl::Duration took = absl::FromChrono(layer.stages.Of(stage));
    if (took <= absl::ZeroDuration()) continue;
    span.attributes.emplace_back(
        absl::StrCat("structkv.", Text(engine::StageName(stage)), "_micros"),
        absl::ToInt64Microseconds(took));
  }
  if (!layer.status.ok()) span.error = ErrorText(layer.status);
  return span;
}

}  // namespace

std::vector<Span> SpansOf(const rpc::PromptReport& prompt, const absl::Status& status) {
  if (prompt.timeline == nullptr || prompt.call.span == nullptr) return {};
  const rpc::PromptTimeline::View view = prompt.timeline->view();
  Span span = Child(prompt.call, prompt.call.span->id, "prompt");
  span.begin = view.begin;
  span.end = view.end.value_or(prompt.call.span->begin + absl::Microseconds(prompt.micros));
  if (!prompt.id.empty()) span.attributes.emplace_back("structkv.session", prompt.id);
  for (const auto& [key, value] : {std::pair("structkv.method", prompt.method),
                                   std::pair("structkv.transport", prompt.transport)}) {
    if (value != "-") span.attributes.emplace_back(key, Text(value));
  }
  for (const auto& [key, value] : {std::pair("structkv.prompt_tokens", prompt.prompt_tokens),
                                   std::pair("structkv.layers", prompt.layers),
                                   std::pair("structkv.layers_answered", prompt.answered),
                                   std::pair("structkv.input_bytes", prompt.input_bytes),
                                   std::pair("structkv.output_bytes", prompt.output_bytes),
                                   std::pair("structkv.reserved_bytes", prompt.reserved_bytes)}) {
    span.attributes.emplace_back(key, value);
  }
  if (!status.ok()) span.error = ErrorText(status);
  std::vector<Span> spans = {std::move(span)};
  const trace::SpanId parent = spans.front().id;
  for (const session::LayerTiming& layer : view.layers) {
    spans.push_back(LayerSpan(prompt, parent, layer));
  }
  return spans;
}

std::vector<Span> SpansOf(const rpc::CompressReport& call, const absl::Status& status) {
  if (call.call.span == nullptr) return {};
  Span span = CallSpanOf(call.call, "structkv.v1.Compression", "Compress", call.micros, status);
  span.attributes.emplace_back("structkv.prompts", call.prompts);
  return {std::move(span)};
}

std::vector<Span> SpansOf(const rpc::FetchReport& fetch, const absl::Status& status) {
  if (fetch.call.span == nullptr) return {};
  Span span = CallSpanOf(fetch.call, "structkv.v1.HeldCaches", "FetchCache", fetch.micros, status);
  if (fetch.transport != "-") {
    span.attributes.emplace_back("structkv.transport", Text(fetch.transport));
  }
  for (const auto& [key, value] :
       {std::pair("structkv.layers", fetch.layers), std::pair("structkv.kv_heads", fetch.kv_heads),
        std::pair("structkv.output_bytes", fetch.output_bytes)}) {
    span.attributes.emplace_back(key, value);
  }
  return {std::move(span)};
}

}  // namespace structkv::admin
