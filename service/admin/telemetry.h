// What is counted, remembered and recorded of a server's streams: the observer that they tell.
#pragma once

#include <optional>
#include <vector>

#include "service/admin/call_spans.h"
#include "service/admin/metrics.h"
#include "service/admin/recent.h"
#include "service/trace/otlp_exporter.h"

namespace structkv::admin {

// Thread-safe. Made before the server, which tells it, and outlives it.
class Telemetry final : public rpc::StreamObserver {
 public:
  // Spans go to `exporter`, which outlives it; null: there are none.
  explicit Telemetry(trace::OtlpExporter* exporter = nullptr) : exporter_(exporter) {}

  void OnLayer(std::string_view method, const session::LayerTiming& timing) override {
    metrics_.CountLayer(method, timing);
  }
  void OnPromptEnd(const rpc::PromptReport& prompt, const absl::Status& status) override {
    recent_.Add(prompt, status);
    metrics_.CountPrompt(prompt, status);
    Record(prompt, status);
  }
  void OnCompressEnd(const rpc::CompressReport& call, const absl::Status& status) override {
    Record(call, status);
  }
  void OnFetchEnd(const rpc::FetchReport& fetch, const absl::Status& status) override {
    // A client asks all replicas but the last whether they have a cache, and fetches from one.
    if (!fetch.info_only) {
      recent_.Add(fetch, status);
      metrics_.CountFetch(fetch, status);
    }
    Record(fetch, status);
  }

  Metrics& metrics() { return metrics_; }
  const Recent& recent() const { return recent_; }
  // None where nothing is recorded.
  std::optional<trace::ExportCounts> spans() const {
    if (exporter_ == nullptr) return std::nullopt;
    return exporter_->counts();
  }

 private:
  template <typename Report>
  void Record(const Report& report, const absl::Status& status) {
    if (exporter_ == nullptr) return;
    std::vector<trace::Span> spans = SpansOf(report, status);
    if (!spans.empty()) exporter_->Add(std::move(spans));
  }

  trace::OtlpExporter* const exporter_;
  Metrics metrics_;
  Recent recent_;
};

}  // namespace structkv::admin
