#include "tests/gpu/overlap_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <latch>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/layer_pass.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/scheduler.h"

namespace structkv::gpu {
namespace {

using engine::Buffer;
using Clock = std::chrono::steady_clock;

constexpr int kSets = 2;  // of buffers, as a prompt has with two layers in flight

// bf16 values of about a normal distribution's spread.
void FillWithValues(uint32_t seed, const Buffer& to) {
  auto* const values = to.as<uint16_t>();
  uint32_t state = seed;
  for (size_t i = 0; i < to.size() / sizeof(uint16_t); ++i) {
    float sum = 0;
    for (int k = 0; k < 3; ++k) {
      state = state * 1664525 + 1013904223;
      sum += static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0F;
    }
    uint32_t bits;
    std::memcpy(&bits, &sum, sizeof(bits));
    values[i] = static_cast<uint16_t>(bits >> 16);
  }
}

// What a layer's call writes, in the host's memory as the server's results are.
struct Answer {
  std::vector<float> sum;
  std::vector<int32_t> positions;
  Buffer keys, values;  // [kv_heads, kept, dim]
};

// A prompt's layers: in the host's memory as they were received, and what comes of them.
struct Prompt {
  Buffer keys[kSets], values[kSets];
  std::shared_ptr<std::byte> copied;  // on the device, where pageable keys alone are copied to
  Answer from_host[kSets], from_device[kSets];
};

class Overlap {
 public:
  Overlap(const Backend& backend, const OverlapOptions& options, int64_t tokens, int prompts,
          bool pinned)
      : backend_(backend),
        options_(options),
        tokens_(tokens),
        kept_((tokens + 9) / 10),
        bytes_(options.kv_heads * tokens * options.dim * 2),
        pinned_(pinned),
        pool_(0, pinned ? backend.host_pinning() : HostPinning()),
        queries_(pool_.Acquire(
            static_cast<size_t>(options.query_heads * options.window * options.dim) * 2)),
        lse_(static_cast<size_t>(options.query_heads * options.window),
             std::log(static_cast<float>(tokens)) + 0.5F),
        scheduler_(std::max(prompts, static_cast<int>(std::thread::hardware_concurrency()))) {
    FillWithValues(1, queries_);
    for (int i = 0; i < prompts; ++i) prompts_.push_back(MakePrompt());
  }

  absl::StatusOr<OverlapRow> Measure() {
    if (absl::Status status = PutOnDevice(); !status.ok()) return status;
    OverlapRow row = {
        .pinned = pinned_, .tokens = tokens_, .prompts = static_cast<int>(prompts_.size())};
    const std::pair<double*, Step> steps[] = {{&row.copies_micros, &Overlap::Copy},
                                              {&row.compute_micros, &Overlap::Compute},
                                              {&row.together_micros, &Overlap::CopyAndCompute}};
    for (const auto& [micros, step] : steps) {
      const absl::StatusOr<double> median = Median(step);
      if (!median.ok()) return median.status();
      *micros = *median;
    }
    for (const Prompt& prompt : prompts_) {
      for (int set = 0; set < kSets; ++set) {
        if (absl::Status status = Check(prompt, set); !status.ok()) return status;
      }
    }
    const absl::StatusOr<int64_t> off = OffTheCpus();
    if (!off.ok()) return off.status();
    row.positions_off_cpu = *off;
    return row;
  }

 private:
  // All layers of a prompt.
  using Step = absl::Status (Overlap::*)(Prompt&, ParallelFor) const;

  Prompt MakePrompt() {
    const auto bytes = static_cast<size_t>(bytes_);
    const auto kept_bytes = static_cast<size_t>(options_.kv_heads * kept_ * options_.dim * 2);
    Prompt prompt;
    for (int set = 0; set < kSets; ++set) {
      prompt.keys[set] = pool_.AcquirePinned(bytes);
      prompt.values[set] = pool_.AcquirePinned(bytes);
      if (prompts_.empty()) {
        FillWithValues(static_cast<uint32_t>(2 + set), prompt.keys[set]);
        FillWithValues(static_cast<uint32_t>(12 + set), prompt.values[set]);
      } else {
        std::memcpy(prompt.keys[set].data(), prompts_[0].keys[set].data(), bytes);
        std::memcpy(prompt.values[set].data(), prompts_[0].values[set].data(), bytes);
      }
      for (Answer* answer : {&prompt.from_host[set], &prompt.from_device[set]}) {
        answer->sum.resize(static_cast<size_t>(tokens_));
        answer->positions.resize(static_cast<size_t>(kept_));
        answer->keys = pool_.Acquire(kept_bytes);
        answer->values = pool_.Acquire(kept_bytes);
      }
    }
    return prompt;
  }

  absl::StatusOr<std::shared_ptr<std::byte>> Room() const {
    return backend_.Reserve(backend_.gpus()[0], bytes_);
  }
  absl::Status Fill(const Buffer& from, std::byte* to) const {
    return backend_.Fill(to, bytes_, [&from](int64_t offset, absl::Span<std::byte> run) {
      std::memcpy(run.data(), from.data() + offset, run.size());
    });
  }

  // The first prompt's layers, with which all compute alone.
  absl::Status PutOnDevice() {
    for (int set = 0; set < kSets; ++set) {
      const std::pair<const Buffer*, std::shared_ptr<std::byte>*> tensors[] = {
          {&prompts_[0].keys[set], &device_keys_[set]},
          {&prompts_[0].values[set], &device_values_[set]}};
      for (const auto& [from, to] : tensors) {
        absl::StatusOr<std::shared_ptr<std::byte>> room = Room();
        if (!room.ok()) return room.status();
        *to = *std::move(room);
        if (absl::Status status = Fill(*from, to->get()); !status.ok()) return status;
      }
    }
    for (Prompt& prompt : prompts_) {
      if (pinned_) break;
      absl::StatusOr<std::shared_ptr<std::byte>> room = Room();
      if (!room.ok()) return room.status();
      prompt.copied = *std::move(room);
    }
    return absl::OkStatus();
  }

  // All prompts at once, microseconds of a layer.
  absl::StatusOr<double> Median(Step step) {
    std::vector<double> micros;
    for (int round = -1; round < options_.rounds; ++round) {
      std::mutex mutex;
      absl::Status status;
      std::latch done(static_cast<std::ptrdiff_t>(prompts_.size()));
      const Clock::time_point begin = Clock::now();
      for (Prompt& prompt : prompts_) {
        scheduler_.Post(scheduler_.NewLane(), /*small=*/false, [&](ParallelFor parallel) {
          absl::Status of_prompt = (this->*step)(prompt, parallel);
          {
            const std::lock_guard lock(mutex);
            status.Update(of_prompt);
          }
          done.count_down();
        });
      }
      done.wait();
      const std::chrono::duration<double, std::micro> wall = Clock::now() - begin;
      if (!status.ok()) return status;
      if (round < 0) continue;  // warms up
      micros.push_back(wall.count() / (static_cast<double>(options_.layers) *
                                       static_cast<double>(prompts_.size())));
    }
    std::sort(micros.begin(), micros.end());
    return micros[micros.size() / 2];
  }

  absl::Status Copy(Prompt& prompt, ParallelFor /*parallel*/) const {
    std::unique_ptr<StagedLayer> before;
    for (int layer = 0; layer < options_.layers; ++layer) {
      const Buffer& keys = prompt.keys[layer % kSets];
      if (!pinned_) {
        if (absl::Status status = Fill(keys, prompt.copied.get()); !status.ok()) return status;
        continue;
      }
      std::unique_ptr<StagedLayer> staged = backend_.Stage(Params(keys.data()), -1);
      if (staged == nullptr) {
        return absl::ResourceExhaustedError(
            absl::StrCat("the keys of ", tokens_, " tokens of ", prompts_.size(),
                         " prompts were not staged: no room, or not pinned"));
      }
      before = std::move(staged);  // waits for the one before
    }
    return absl::OkStatus();
  }

  absl::Status Compute(Prompt& prompt, ParallelFor parallel) const {
    for (int layer = 0; layer < options_.layers; ++layer) {
      const int set = layer % kSets;
      absl::Status status = Run(device_keys_[set].get(), device_values_[set].get(), nullptr,
                                &prompt.from_device[set], parallel);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  // As the server has it: the next layer is there while one is computed.
  absl::Status CopyAndCompute(Prompt& prompt, ParallelFor parallel) const {
    std::unique_ptr<StagedLayer> next;
    for (int layer = 0; layer < options_.layers; ++layer) {
      const int set = layer % kSets;
      std::unique_ptr<StagedLayer> staged = std::move(next);
      if (layer + 1 < options_.layers) {
        next = backend_.Stage(Params(prompt.keys[(layer + 1) % kSets].data()), -1);
      }
      absl::Status status = Run(prompt.keys[set].data(), prompt.values[set].data(), staged.get(),
                                &prompt.from_host[set], parallel);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  TensorView View(const void* data, int64_t tokens) const {
    return TensorView::Dense(data, DType::kBF16, Layout::kHeadTokenDim, options_.kv_heads, tokens,
                             options_.dim);
  }
  SaliencyParams Params(const void* keys) const {
    return {.queries = TensorView::Dense(queries_.data(), DType::kBF16, Layout::kHeadTokenDim,
                                         options_.query_heads, options_.window, options_.dim),
            .keys = View(keys, tokens_),
            .lse = lse_.data()};
  }

  absl::Status Run(const std::byte* keys, const std::byte* values, StagedLayer* staged,
                   Answer* answer, ParallelFor parallel) const {
    const auto room = [this](const Buffer& rows) {
      return MutableTensorView::Dense(rows.data(), DType::kBF16, Layout::kHeadTokenDim,
                                      options_.kv_heads, kept_, options_.dim);
    };
    SaliencySums sums;
    const LayerPass pass = {
        .saliency = Params(keys),
        .top_count = kept_,
        .window = options_.window,
        .keep = kept_,
        .rows = {{.source = View(keys, tokens_), .destination = room(answer->keys)},
                 {.source = View(values, tokens_), .destination = room(answer->values)}},
        .staged = staged,
        .sum = answer->sum.data(),
        .positions = answer->positions.data(),
        .sums = &sums};
    return backend_.RunLayer(pass, nullptr, parallel);
  }

  absl::Status Check(const Prompt& prompt, int set) const {
    const Answer& got = prompt.from_host[set];
    if (got.positions != prompt.from_device[set].positions) {
      return absl::InternalError(
          absl::StrCat("of ", tokens_, " tokens others stay where they come from the host"));
    }
    const auto row_bytes = static_cast<size_t>(options_.dim) * 2;
    const std::pair<const Buffer*, const Buffer*> tensors[] = {
        {&prompt.keys[set], &got.keys},
        {&prompt.values[set], &got.values},
        {&prompt.keys[set], &prompt.from_device[set].keys},
        {&prompt.values[set], &prompt.from_device[set].values}};
    for (const auto& [source, rows] : tensors) {
      const TensorView from = View(source->data(), tokens_);
      const TensorView to = View(rows->data(), kept_);
      for (int64_t head = 0; head < options_.kv_heads; ++head) {
        for (int64_t i = 0; i < kept_; ++i) {
          const int32_t position = got.positions[static_cast<size_t>(i)];
          if (std::memcmp(from.Row(head, position), to.Row(head, i), row_bytes) == 0) continue;
          return absl::InternalError(
              absl::StrCat("row ", i, " of KV head ", head, " is not that of token ", position));
        }
      }
    }
    return absl::OkStatus();
  }

  // Positions of the first layer that the CPU does not keep.
  absl::StatusOr<int64_t> OffTheCpus() const {
    absl::StatusOr<std::unique_ptr<Backend>> cpu = cpu::CreateCpuBackend();
    if (!cpu.ok()) return cpu.status();
    std::vector<float> heads(static_cast<size_t>(options_.kv_heads * tokens_));
    std::vector<float> sum(static_cast<size_t>(tokens_));
    std::vector<int32_t> positions(static_cast<size_t>(kept_));
    absl::Status status =
        (*cpu)->Saliency(Params(prompts_[0].keys[0].data()), heads.data(), nullptr, SerialFor);
    if (!status.ok()) return status;
    (*cpu)->SumHeads(heads.data(), options_.kv_heads, tokens_, sum.data(), SerialFor);
    (*cpu)->Select(
        {.scores = sum.data(), .tokens = tokens_, .window = options_.window, .keep = kept_},
        positions.data());
    std::vector<int32_t> off;
    const std::vector<int32_t>& got = prompts_[0].from_host[0].positions;
    std::set_difference(got.begin(), got.end(), positions.begin(), positions.end(),
                        std::back_inserter(off));
    return static_cast<int64_t>(off.size());
  }

  const Backend& backend_;
  const OverlapOptions& options_;
  const int64_t tokens_;
  const int64_t kept_;
  const int64_t bytes_;  // of keys, and of values
  const bool pinned_;
  engine::BufferPool pool_;
  const Buffer queries_;
  const std::vector<float> lse_;
  std::vector<Prompt> prompts_;
  std::shared_ptr<std::byte> device_keys_[kSets], device_values_[kSets];
  engine::Scheduler scheduler_;
};

}  // namespace

double OverlapRow::over_max() const {
  return together_micros / std::max(copies_micros, compute_micros);
}
double OverlapRow::over_sum() const { return together_micros / (copies_micros + compute_micros); }

absl::StatusOr<std::vector<OverlapRow>> MeasureOverlap(const Backend& backend,
                                                       const OverlapOptions& options) {
  if (const size_t gpus = backend.gpus().size(); gpus != 1) {
    return absl::FailedPreconditionError(
        absl::StrCat(gpus, " GPUs; one is measured (CUDA_VISIBLE_DEVICES)"));
  }
  std::vector<OverlapRow> rows;
  for (const bool pinned : {true, false}) {
    for (const int64_t tokens : options.tokens) {
      for (const int prompts : options.prompts) {
        absl::StatusOr<OverlapRow> row =
            Overlap(backend, options, tokens, prompts, pinned).Measure();
        if (!row.ok()) return row.status();
        rows.push_back(*row);
      }
    }
  }
  return rows;
}

std::string OverlapJson(const std::string& device, const std::vector<OverlapRow>& rows) {
  std::string text = absl::StrCat("{\"device\": \"", device, "\", \"rows\": [");
  for (const OverlapRow& row : rows) {
    absl::StrAppendFormat(
        &text,
        "%s\n  {\"memory\": \"%s\", \"tokens\": %d, \"prompts\": %d, \"copies_micros\": %.1f, "
        "\"compute_micros\": %.1f, \"together_micros\": %.1f, \"over_max\": %.3f, "
        "\"over_sum\": %.3f, \"positions_off_cpu\": %d}",
        &row == &rows[0] ? "" : ",", row.pinned ? "pinned" : "pageable", row.tokens, row.prompts,
        row.copies_micros, row.compute_micros, row.together_micros, row.over_max(), row.over_sum(),
        row.positions_off_cpu);
  }
  return absl::StrCat(text, "]}\n");
}

std::string OverlapTable(const std::vector<OverlapRow>& rows) {
  std::string text =
      "\n| layers from the host | tokens | prompts | copies, us | computation, us | together, us | "
      "over the longer | over the sum |\n|---|---|---|---|---|---|---|---|\n";
  for (const OverlapRow& row : rows) {
    absl::StrAppendFormat(&text, "| %s | %d | %d | %.1f | %.1f | %.1f | %.2f | %.2f |\n",
                          row.pinned ? "pinned" : "pageable", row.tokens, row.prompts,
                          row.copies_micros, row.compute_micros, row.together_micros,
                          row.over_max(), row.over_sum());
  }
  return text;
}

}  // namespace structkv::gpu
