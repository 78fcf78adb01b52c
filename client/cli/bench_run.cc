#include "client/cli/bench_run.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <optional>
#include <thread>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/types/span.h"
#include "client/cli/text.h"
#include "structkv/sizes.h"

namespace structkv::cli {
namespace {

// Memory for results, used over and over: a result is dropped before the next one arrives.
class Scratch {
 public:
  client::Bytes Get(v1::Tensor tensor, size_t size) {
    std::vector<std::byte>& memory = memory_[tensor];
    if (memory.size() < size) memory.resize(size);
    return {memory.data(), size, nullptr};
  }

 private:
  std::map<int, std::vector<std::byte>> memory_;
};

// What the service answers to `open`, without sending it anything.
absl::StatusOr<v1::Opened> Probe(Compressor& compressor, const v1::Open& open,
                                 client::SessionOptions options) {
  std::optional<v1::Opened> opened;
  options.transport = client::TransportChoice::kInline;
  options.on_opened = [&opened](const v1::Opened& o) { opened = o; };
  options.on_event = [](const client::Event&) {};
  const auto source = [](uint32_t) -> absl::StatusOr<client::LayerTensors> {
    return absl::CancelledError("probe");
  };
  const absl::StatusOr<v1::Summary> summary = compressor.Run(open, source, options);
  if (!opened.has_value()) return summary.status();
  return *std::move(opened);
}

// `open` of a rank; of one rank alone, `open`.
v1::Open RankOpen(v1::Open open, uint32_t ranks, uint32_t index, const std::string& group) {
  if (ranks == 1) return open;
  open.mutable_shard_group()->set_group_id(group);
  open.mutable_shard_group()->set_shard_count(ranks);
  open.mutable_shard_group()->set_shard_index(index);
  return open;
}

std::string NewGroup(const void* owner) {
  return absl::StrCat("bench-", absl::GetCurrentTimeNanos(), "-",
                      reinterpret_cast<uintptr_t>(owner));
}

// One prompt on its way, and its times.
class Timed {
 public:
  // `layers_done` counts answers; may be null.
  Timed(const BenchPrompt* prompt, std::atomic<uint64_t>* layers_done)
      : prompt_(*prompt),
        layers_done_(layers_done),
        start_(absl::Now()),
        sent_(prompt->open.geometry().layer_count()) {
    latencies_.reserve(sent_.size());
    // A layer of which nothing is sent is due from the start on.
    for (std::atomic<int64_t>& sent : sent_) sent.store(absl::ToUnixNanos(start_));
  }

  client::LayerTensors Layer(uint32_t layer) {
    sent_[layer].store(absl::GetCurrentTimeNanos());
    return prompt_.tensors->Layer(layer);
  }

  void OnOpened(const v1::Opened& opened) { transport_reason_ = opened.transport_reason(); }

  void OnEvent(const client::Event& event) {
    if (std::holds_alternative<v1::Summary>(event)) seconds_ = absl::Now() - start_;
    const auto* layer = std::get_if<client::LayerResult>(&event);
    if (layer == nullptr) return;
    latencies_.push_back(
        static_cast<double>(absl::GetCurrentTimeNanos() - sent_[layer->layer].load()) * 1e-9);
    if (layers_done_ != nullptr) layers_done_->fetch_add(1);
  }

  // After the end. Adds bytes and, where it is a prompt and not a further rank's part, times.
  void AddTo(const v1::Summary& summary, bool times, BenchFigures* figures) const {
    absl::MutexLock lock(&figures->mutex);
    figures->input_bytes += summary.input_bytes();
    figures->output_bytes += summary.output_bytes();
    if (!times) return;
    figures->prompt_seconds.push_back(absl::ToDoubleSeconds(seconds_));
    figures->layer_seconds.insert(figures->layer_seconds.end(), latencies_.begin(),
                                  latencies_.end());
    figures->compute_micros += summary.timing().compute_micros();
    figures->queue_micros += summary.timing().queue_micros();
    figures->backend = summary.backend();
    figures->transport = summary.transport();
    figures->transport_reason = transport_reason_;
  }

 private:
  const BenchPrompt& prompt_;
  std::atomic<uint64_t>* const layers_done_;
  const absl::Time start_;
  // Sent by one thread, answered on another: atomic, so that the two need no lock.
  std::vector<std::atomic<int64_t>> sent_;
  std::vector<double> latencies_;
  absl::Duration seconds_;
  std::string transport_reason_;
};

// Sends one prompt, or one batch, at a time.
class Worker {
 public:
  Worker(const BenchFlags* flags, absl::Span<const std::unique_ptr<Compressor>> compressors,
         const std::vector<BenchPrompt>* prompts, std::atomic<uint64_t>* layers_done,
         BenchFigures* figures)
      : flags_(*flags),
        compressors_(compressors),
        prompts_(*prompts),
        layers_done_(layers_done),
        figures_(figures),
        scratch_(prompts->size()) {}

  // Takes prompts off the counter until none is left or one has failed.
  void Run(std::atomic<uint32_t>* next) {
    while (true) {
      const uint32_t first = next->fetch_add(flags_.batch);
      if (first >= flags_.prompts) return;
      const double cpu = OwnCpuSeconds();
      absl::Status status =
          flags_.batch > 1 ? RunBatch(std::min(flags_.batch, flags_.prompts - first)) : RunRanks();
      if (status.ok() && flags_.hold) status = FetchAll(OwnCpuSeconds() - cpu);
      if (status.ok()) continue;
      absl::MutexLock lock(&figures_->mutex);
      figures_->status.Update(status);
      next->store(flags_.prompts);
    }
  }

 private:
  client::SessionOptions OptionsOf(size_t i, Timed* timed) {
    client::SessionOptions options = MakeSessionOptions(flags_.connection);
    options.checksums = flags_.checksums;
    options.chunk_bytes = size_t{flags_.chunk_kib} << 10;
    options.allocate = [own = &scratch_[i]](uint32_t, v1::Tensor tensor, size_t size) {
      return own->Get(tensor, size);
    };
    UseSharedMemory(prompts_[i].memory, &options);
    options.on_opened = [timed](const v1::Opened& opened) { timed->OnOpened(opened); };
    options.on_event = [timed](const client::Event& event) { timed->OnEvent(event); };
    return options;
  }

  // Fetches and frees what the last prompts left in the server.
  absl::Status FetchAll(double hold_cpu_seconds) {
    if (!fetcher_.has_value()) {
      absl::StatusOr<HeldFetcher> fetcher = HeldFetcher::Connect(flags_, prompts_[0].memory);
      if (!fetcher.ok()) return fetcher.status();
      fetcher_.emplace(*std::move(fetcher));
    }
    FetchFigures fetches;
    for (const v1::HeldCache& cache : held_) {
      if (absl::Status status = fetcher_->Run(cache, &fetches); !status.ok()) return status;
    }
    absl::MutexLock lock(&figures_->mutex);
    figures_->fetches.Add(fetches);
    figures_->hold_cpu_seconds += hold_cpu_seconds;
    return absl::OkStatus();
  }

  absl::Status RunRank(size_t rank, const std::string& group) {
    const BenchPrompt& prompt = prompts_[rank];
    const bool first = rank == 0;
    Timed timed(&prompt, first ? layers_done_ : nullptr);
    const v1::Open open = RankOpen(prompt.open, static_cast<uint32_t>(prompts_.size()),
                                   static_cast<uint32_t>(rank), group);
    const auto source = [&](uint32_t layer) { return timed.Layer(layer); };
    absl::StatusOr<v1::Summary> summary =
        compressors_[rank]->Run(open, source, OptionsOf(rank, &timed));
    if (!summary.ok()) return summary.status();
    timed.AddTo(*summary, first, figures_);
    held_[rank] = summary->held();
    return absl::OkStatus();
  }

  // The ranks of one prompt together, each on a thread and a connection of its own.
  absl::Status RunRanks() {
    const std::string group = NewGroup(this);
    held_.assign(prompts_.size(), {});
    std::vector<absl::Status> statuses(prompts_.size());
    std::vector<std::thread> threads;
    for (size_t i = 1; i < prompts_.size(); ++i) {
      threads.emplace_back([&, i] { statuses[i] = RunRank(i, group); });
    }
    statuses[0] = RunRank(0, group);
    for (std::thread& thread : threads) thread.join();
    absl::Status worst;
    for (const absl::Status& status : statuses) {
      // The rank at fault says why; others were ended with it, or waited for it in vain.
      if (status.ok()) continue;
      if (worst.ok() || absl::IsAborted(worst) || absl::IsDeadlineExceeded(worst)) worst = status;
    }
    return worst;
  }

  // The first `count` prompts, in one stream.
  absl::Status RunBatch(uint32_t count) {
    held_.assign(count, {});
    std::deque<Timed> timed;
    std::vector<client::BatchPrompt> batch;
    client::SessionOptions options;
    for (uint32_t i = 0; i < count; ++i) {
      timed.emplace_back(&prompts_[i], layers_done_);
      options = OptionsOf(i, &timed.back());
      batch.push_back({prompts_[i].open, options});
    }
    const auto source = [&](size_t i, uint32_t layer) { return timed[i].Layer(layer); };
    const auto summaries = compressors_[0]->RunBatch(batch, source, options);
    for (uint32_t i = 0; i < count; ++i) {
      if (!summaries[i].ok()) return summaries[i].status();
      timed[i].AddTo(*summaries[i], /*times=*/true, figures_);
      held_[i] = summaries[i]->held();
    }
    return absl::OkStatus();
  }

  const BenchFlags& flags_;
  const absl::Span<const std::unique_ptr<Compressor>> compressors_;
  const std::vector<BenchPrompt>& prompts_;
  std::atomic<uint64_t>* const layers_done_;
  BenchFigures* const figures_;
  std::vector<Scratch> scratch_;     // of each prompt
  std::vector<v1::HeldCache> held_;  // what the last prompts left in the server
  std::optional<HeldFetcher> fetcher_;
};

// Makes the tensors of `prompts`, in memory that a server can share where the flags allow.
absl::Status MakeTensors(const BenchFlags& flags, std::vector<BenchPrompt>* prompts) {
  uint64_t bytes = 0;
  for (BenchPrompt& prompt : *prompts) {
    // Results, or what is fetched, and rows that are pulled, of each prompt that runs at a time.
    v1::Open whole = prompt.open;
    if (flags.hold) whole.set_output(v1::OUTPUT_COMPACT);
    bytes += SyntheticPrompt::SizeOf(prompt.open, WithPulledTensors(prompt.open, prompt.opened)) +
             2 * flags.concurrency * client::MostResultBytes(whole);
  }
  const absl::StatusOr<SharedMemory> memory = MakeSharedMemory(flags.connection, bytes);
  if (!memory.ok()) return memory.status();
  for (size_t i = 0; i < prompts->size(); ++i) {
    BenchPrompt& prompt = (*prompts)[i];
    prompt.memory = *memory;
    const v1::Opened opened = WithPulledTensors(prompt.open, prompt.opened);
    client::Arena* const arena = memory->arena.get();
    const bool in_arena = arena != nullptr && !memory->on_gpu();
    prompt.tensors = in_arena
                         ? std::make_unique<SyntheticPrompt>(
                               prompt.open, opened, flags.seed + i,
                               [&](size_t size) { return arena->Allocate(size).value(); })
                         : std::make_unique<SyntheticPrompt>(prompt.open, opened, flags.seed + i);
    if (!memory->on_gpu()) continue;
    if (absl::Status status = prompt.tensors->MoveTo(arena); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<BenchPrompt>> MakeBenchPrompts(const BenchFlags& flags,
                                                          Compressor& compressor) {
  std::vector<BenchPrompt> prompts;
  const std::vector<uint32_t> lengths = BatchTokens(flags);
  for (size_t i = 0; i < std::max<size_t>(flags.batch, flags.shards); ++i) {
    BenchPrompt& prompt = prompts.emplace_back();
    absl::StatusOr<v1::Open> whole = MakeBenchOpen(flags, lengths[std::min(i, lengths.size() - 1)]);
    if (!whole.ok()) return whole.status();
    prompt.open = RankOpen(*whole, flags.shards, static_cast<uint32_t>(i), "");
    if (i > 0 && flags.shards > 1) {  // all ranks get the same answer
      prompt.opened = prompts[0].opened;
    } else {
      absl::StatusOr<v1::Opened> opened =
          Probe(compressor, RankOpen(*whole, flags.shards, 0, NewGroup(&prompts)),
                MakeSessionOptions(flags.connection));
      if (!opened.ok()) return opened.status();
      prompt.opened = *std::move(opened);
    }
  }
  if (absl::Status status = MakeTensors(flags, &prompts); !status.ok()) return status;
  return prompts;
}

uint32_t BenchConnections(const BenchFlags& flags) {
  return flags.connection.in_process ? 1 : flags.concurrency * flags.shards;
}

void RunBenchPrompts(const BenchFlags& flags,
                     const std::vector<std::unique_ptr<Compressor>>& compressors,
                     const std::vector<BenchPrompt>& prompts, BenchFigures* figures) {
  std::atomic<uint32_t> next{0};
  std::atomic<uint64_t> layers_done{0};
  std::atomic<uint32_t> running{flags.concurrency};
  std::atomic<int64_t> finished{0};  // of the last worker, so that the display costs nothing
  const absl::Time start = absl::Now();
  std::vector<std::thread> workers;
  for (uint32_t i = 0; i < flags.concurrency; ++i) {
    workers.emplace_back([&, i] {
      const auto own = absl::MakeConstSpan(compressors)
                           .subspan(i * flags.shards % compressors.size(), flags.shards);
      Worker(&flags, own, &prompts, &layers_done, figures).Run(&next);
      finished.store(absl::GetCurrentTimeNanos());
      running.fetch_sub(1);
    });
  }
  Progress progress("benchmarking");
  const uint64_t total = uint64_t{flags.prompts} * prompts[0].open.geometry().layer_count();
  while (running.load() > 0) {
    progress.Update(layers_done.load(), total, "layers");
    absl::SleepFor(absl::Milliseconds(2));
  }
  for (std::thread& worker : workers) worker.join();
  figures->wall_seconds = absl::ToDoubleSeconds(absl::FromUnixNanos(finished.load()) - start);
  progress.Clear();
}

}  // namespace structkv::cli
