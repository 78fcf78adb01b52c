// What is counted and remembered of a server's streams: the observer that they tell.
#pragma once

#include "service/admin/metrics.h"
#include "service/admin/recent.h"

namespace structkv::admin {

// Thread-safe. Made before the server, which tells it, and outlives it.
class Telemetry final : public rpc::StreamObserver {
 public:
  void OnLayer(std::string_view method, const session::LayerTiming& timing) override {
    metrics_.CountLayer(method, timing);
  }
  void OnPromptEnd(const rpc::PromptReport& prompt, const absl::Status& status) override {
    recent_.Add(prompt, status);
    metrics_.CountPrompt(prompt, status);
  }
  void OnFetchEnd(const rpc::FetchReport& fetch, const absl::Status& status) override {
    recent_.Add(fetch, status);
    metrics_.CountFetch(fetch, status);
  }

  Metrics& metrics() { return metrics_; }
  const Recent& recent() const { return recent_; }

 private:
  Metrics metrics_;
  Recent recent_;
};

}  // namespace structkv::admin
