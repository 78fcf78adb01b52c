#include "structkv/compress.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <variant>

#include "absl/time/clock.h"

namespace structkv::client {
namespace {

// Sends all layers and the commit.
absl::Status SendAll(CompressSession& session, LayerSource source) {
  const uint32_t layers = session.open().geometry().layer_count();
  for (uint32_t layer = 0; layer < layers; ++layer) {
    if (session.opened().kept_tokens(static_cast<int>(layer)) == 0) continue;  // needs no tensors
    absl::StatusOr<LayerTensors> tensors = source(layer);
    if (!tensors.ok()) return tensors.status();
    absl::Status status = session.SendLayer(layer, *tensors);
    if (!status.ok()) return status;
  }
  return session.Commit();
}

// Sends one layer after the other, each once those before it were answered, then the commit, and
// reads to the end. Events go to `on_event`.
absl::StatusOr<v1::Summary> Step(CompressSession& session, SteppedSource source,
                                 const std::function<void(Event)>& on_event) {
  std::optional<PivotResult> pivot;
  uint32_t answered = 0;
  std::optional<v1::Summary> summary;
  const auto read = [&]() -> absl::Status {
    absl::StatusOr<Event> event = session.NextEvent();
    if (!event.ok()) return event.status();
    if (const auto* decided = std::get_if<PivotResult>(&*event)) pivot = *decided;
    if (const auto* last = std::get_if<v1::Summary>(&*event)) summary = *last;
    if (std::holds_alternative<LayerResult>(*event)) ++answered;
    on_event(*std::move(event));
    return absl::OkStatus();
  };
  const uint32_t layers = session.open().geometry().layer_count();
  absl::Status status;
  for (uint32_t layer = 0; layer < layers && status.ok(); ++layer) {
    absl::StatusOr<LayerTensors> tensors = source(layer, pivot.has_value() ? &*pivot : nullptr);
    if (!tensors.ok()) return tensors.status();
    status = session.SendLayer(layer, *tensors);
    while (status.ok() && answered <= layer) status = read();
  }
  if (status.ok()) status = session.Commit();
  while (status.ok() && !summary.has_value()) status = read();
  if (!status.ok()) return status;
  return *std::move(summary);
}

// Opens the prompt and runs it, and again where the server went away before its first result.
// `run` gets the session; `answered` says whether a result came.
template <typename Run>
absl::StatusOr<v1::Summary> Attempts(Client& client, const v1::Open& open,
                                     const SessionOptions& options, SessionOptions attempt_options,
                                     const std::atomic<bool>& answered, Run run) {
  const absl::Time deadline = absl::Now() + options.timeout;
  v1::Open request = open;
  absl::Duration delay = options.retry.initial_backoff;
  for (int attempt = 1;; ++attempt) {
    attempt_options.timeout = deadline - absl::Now();
    absl::StatusOr<std::unique_ptr<CompressSession>> session =
        client.OpenPrompt(request, attempt_options);
    if (!session.ok()) return session.status();
    request.set_idempotency_key((*session)->open().idempotency_key());
    absl::StatusOr<v1::Summary> summary = run(**session);
    if (summary.ok()) return summary;
    const absl::Status& status = summary.status();
    // An admitted prompt is tried again only where the server went away before its first result.
    const bool again = status.code() == absl::StatusCode::kUnavailable && !answered.load() &&
                       attempt < options.retry.max_attempts && absl::Now() + delay < deadline;
    if (!again) return status;
    session->reset();
    absl::SleepFor(delay);
    delay = std::min(options.retry.max_backoff, delay * options.retry.multiplier);
  }
}

}  // namespace

absl::StatusOr<v1::Summary> StreamPrompt(Client& client, const v1::Open& open, LayerSource source,
                                         const SessionOptions& options) {
  if (!options.on_event) {
    return absl::InvalidArgumentError("StreamPrompt: SessionOptions.on_event is not set");
  }
  auto answered = std::make_shared<std::atomic<bool>>(false);
  SessionOptions attempt_options = options;
  attempt_options.on_event = [answered, on_event = options.on_event](Event event) {
    answered->store(true);
    on_event(std::move(event));
  };
  return Attempts(client, open, options, std::move(attempt_options), *answered,
                  [source](CompressSession& session) -> absl::StatusOr<v1::Summary> {
                    absl::Status status = SendAll(session, source);
                    if (!status.ok()) return status;
                    return session.Wait();
                  });
}

absl::StatusOr<v1::Summary> StreamPromptInSteps(Client& client, const v1::Open& open,
                                                SteppedSource source,
                                                const SessionOptions& options) {
  if (!options.on_event) {
    return absl::InvalidArgumentError("StreamPromptInSteps: SessionOptions.on_event is not set");
  }
  std::atomic<bool> answered = false;
  SessionOptions attempt_options = options;
  attempt_options.on_event = nullptr;
  return Attempts(client, open, options, std::move(attempt_options), answered,
                  [&](CompressSession& session) {
                    return Step(session, source, [&](Event event) {
                      answered.store(true);
                      options.on_event(std::move(event));
                    });
                  });
}

absl::StatusOr<Compressed> CompressPrompt(Client& client, const v1::Open& open, LayerSource source,
                                          const SessionOptions& options) {
  Compressed compressed;
  SessionOptions collecting = options;
  collecting.on_opened = [&compressed, &options](const v1::Opened& opened) {
    compressed.opened = opened;
    if (options.on_opened) options.on_opened(opened);
  };
  collecting.on_event = [&compressed, &options](Event event) {
    if (options.on_event) options.on_event(event);
    if (auto* layer = std::get_if<LayerResult>(&event)) {
      compressed.layers.push_back(std::move(*layer));
    } else if (auto* pivot = std::get_if<PivotResult>(&event)) {
      compressed.pivot = std::move(*pivot);
    } else {
      compressed.summary = std::get<v1::Summary>(std::move(event));
    }
  };
  absl::StatusOr<v1::Summary> summary = StreamPrompt(client, open, source, collecting);
  if (!summary.ok()) return summary.status();
  std::sort(compressed.layers.begin(), compressed.layers.end(),
            [](const LayerResult& a, const LayerResult& b) { return a.layer < b.layer; });
  return compressed;
}

}  // namespace structkv::client
