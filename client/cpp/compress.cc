#include "structkv/compress.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "absl/time/clock.h"
#include "client/cpp/retry.h"

namespace structkv::client {
namespace {

// A prompt of a call, and how far it has come.
struct Run {
  BatchPrompt prompt;
  std::atomic<bool> answered = false;        // a result came
  std::unique_ptr<CompressSession> session;  // of the attempt; null once it has failed
  absl::StatusOr<v1::Summary> summary;
};

// Sends a layer, and with the last one the commit.
absl::Status SendOne(CompressSession& session, uint32_t layer,
                     absl::FunctionRef<absl::StatusOr<LayerTensors>()> source) {
  if (session.opened().kept_tokens(static_cast<int>(layer)) > 0) {  // the others need no tensors
    absl::StatusOr<LayerTensors> tensors = source();
    if (!tensors.ok()) return tensors.status();
    absl::Status status = session.SendLayer(layer, *tensors);
    if (!status.ok()) return status;
  }
  const bool last = layer + 1 == session.open().geometry().layer_count();
  return last ? session.Commit() : absl::OkStatus();
}

// Sends everything, a layer of each prompt in turn, and waits for the ends.
void SendAll(absl::Span<const std::unique_ptr<Run>> runs, BatchSource source) {
  uint32_t layers = 0;
  for (const auto& run : runs) {
    layers = std::max(layers, run->prompt.open.geometry().layer_count());
  }
  for (uint32_t layer = 0; layer < layers; ++layer) {
    for (size_t i = 0; i < runs.size(); ++i) {
      Run& run = *runs[i];
      if (run.session == nullptr || layer >= run.prompt.open.geometry().layer_count()) continue;
      absl::Status status = SendOne(*run.session, layer, [&] { return source(i, layer); });
      if (status.ok()) continue;
      run.summary = std::move(status);
      run.session = nullptr;
    }
  }
  for (const auto& run : runs) {
    if (run->session != nullptr) run->summary = run->session->Wait();
  }
}

// Sends one layer after the other, each once those before it were answered, then the commit, and
// reads to the end. Events go to `on_event`.
absl::StatusOr<v1::Summary> Step(CompressSession& session, SteppedSource source,
                                 const std::function<void(Event)>& on_event) {
  std::optional<PivotResult> pivot;
  std::set<uint32_t> answered;  // layers; those that need no tensors come when they will
  std::optional<v1::Summary> summary;
  const auto read = [&]() -> absl::Status {
    absl::StatusOr<Event> event = session.NextEvent();
    if (!event.ok()) return event.status();
    if (const auto* decided = std::get_if<PivotResult>(&*event)) pivot = *decided;
    if (const auto* last = std::get_if<v1::Summary>(&*event)) summary = *last;
    if (const auto* result = std::get_if<LayerResult>(&*event)) answered.insert(result->layer);
    on_event(*std::move(event));
    return absl::OkStatus();
  };
  const uint32_t layers = session.open().geometry().layer_count();
  absl::Status status;
  for (uint32_t layer = 0; layer < layers && status.ok(); ++layer) {
    if (session.opened().kept_tokens(static_cast<int>(layer)) == 0) continue;  // as in SendOne()
    absl::StatusOr<LayerTensors> tensors = source(layer, pivot.has_value() ? &*pivot : nullptr);
    if (!tensors.ok()) return tensors.status();
    status = session.SendLayer(layer, *tensors);
    while (status.ok() && !answered.contains(layer)) status = read();
  }
  if (status.ok()) status = session.Commit();
  while (status.ok() && !summary.has_value()) status = read();
  if (!status.ok()) return status;
  return *std::move(summary);
}

// Opens the prompts in one stream and has `run` give each session a summary; then those again that
// failed before their first result and may be tried again.
void Attempts(Client& client, absl::Span<const std::unique_ptr<Run>> runs,
              const StreamOptions& options, absl::FunctionRef<void()> run) {
  const absl::Time deadline = absl::Now() + options.timeout;
  std::vector<Run*> due;
  for (const auto& each : runs) due.push_back(each.get());
  for (int attempt = 1;; ++attempt) {
    StreamOptions attempt_options = options;
    attempt_options.timeout = deadline - absl::Now();
    std::vector<BatchPrompt> prompts;
    prompts.reserve(due.size());
    for (const Run* each : due) prompts.push_back(each->prompt);
    auto sessions = client.OpenBatch(prompts, attempt_options);
    bool admitted = false;
    for (size_t i = 0; i < due.size(); ++i) {
      if (!sessions[i].ok()) {
        due[i]->summary = sessions[i].status();
        continue;
      }
      admitted = true;
      due[i]->session = *std::move(sessions[i]);
      due[i]->prompt.open.set_idempotency_key(due[i]->session->open().idempotency_key());
    }
    if (!admitted) return;  // and OpenBatch has tried again
    run();
    absl::Duration delay;
    std::vector<Run*> again;
    for (Run* each : due) {
      each->session = nullptr;
      if (each->summary.ok() || each->answered.load()) continue;
      const auto wait = internal::RetryDelay(options.retry, attempt, each->summary.status());
      if (!wait.has_value()) continue;
      again.push_back(each);
      delay = std::max(delay, *wait);
    }
    if (again.empty() || absl::Now() + delay >= deadline) return;
    due = std::move(again);
    absl::SleepFor(delay);
  }
}

}  // namespace

std::vector<absl::StatusOr<v1::Summary>> StreamBatch(Client& client,
                                                     absl::Span<const BatchPrompt> prompts,
                                                     BatchSource source,
                                                     const StreamOptions& options) {
  std::vector<std::unique_ptr<Run>> runs;
  for (const BatchPrompt& prompt : prompts) {
    Run* run = runs.emplace_back(std::make_unique<Run>()).get();
    run->prompt = prompt;
    run->prompt.options.on_event = [run, on_event = prompt.options.on_event](Event event) {
      run->answered.store(true);
      if (on_event) on_event(std::move(event));
    };
  }
  Attempts(client, runs, options, [&] { SendAll(runs, source); });
  std::vector<absl::StatusOr<v1::Summary>> summaries;
  summaries.reserve(runs.size());
  for (const auto& run : runs) summaries.push_back(std::move(run->summary));
  return summaries;
}

absl::StatusOr<v1::Summary> StreamPrompt(Client& client, const v1::Open& open, LayerSource source,
                                         const SessionOptions& options) {
  if (!options.on_event) {
    return absl::InvalidArgumentError("StreamPrompt: SessionOptions.on_event is not set");
  }
  const BatchPrompt prompt = {open, options};
  return std::move(StreamBatch(
                       client, absl::MakeConstSpan(&prompt, 1),
                       [source](size_t, uint32_t layer) { return source(layer); }, options)
                       .front());
}

absl::StatusOr<v1::Summary> StreamPromptInSteps(Client& client, const v1::Open& open,
                                                SteppedSource source,
                                                const SessionOptions& options) {
  if (!options.on_event) {
    return absl::InvalidArgumentError("StreamPromptInSteps: SessionOptions.on_event is not set");
  }
  const std::unique_ptr<Run> run = std::make_unique<Run>();
  run->prompt = {open, options};
  run->prompt.options.on_event = nullptr;
  Attempts(client, absl::MakeConstSpan(&run, 1), options, [&] {
    run->summary = Step(*run->session, source, [&](Event event) {
      run->answered.store(true);
      options.on_event(std::move(event));
    });
  });
  return std::move(run->summary);
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
