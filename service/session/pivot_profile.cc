#include "service/session/pivot_profile.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "service/session/pivot_profile_file.h"

namespace structkv::session {
namespace {

PivotModel ModelOf(const engine::PromptSpec& spec) {
  const method::PivotSpec& pivot = spec.method.pivot;
  return {.model_id = spec.model_id,
          .layers = spec.geometry.layers,
          .detection = {pivot.sparsity_ratio, pivot.entropy_weight, pivot.sparsity_weight,
                        pivot.variance_weight, pivot.search_begin, pivot.search_end}};
}

}  // namespace

class PivotProfile::Impl {
 public:
  explicit Impl(PivotProfileOptions options) : options_(std::move(options)) {}

  ~Impl() {
    if (!writer_.joinable()) return;
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    writer_.join();
    Flush().IgnoreError();  // warned of
  }

  absl::Status Load() {
    if (options_.file.empty()) return absl::OkStatus();
    if (absl::Status status = CheckPivotDirectory(options_.file); !status.ok()) return status;
    const absl::StatusOr<std::string> text = ReadPivotFile(options_.file);
    if (!text.ok() && !absl::IsNotFound(text.status())) return text.status();
    if (text.ok()) {
      const absl::StatusOr<std::vector<PivotRecord>> records = DecodePivotFile(*text);
      if (!records.ok()) {
        const absl::StatusOr<std::string> aside = SetPivotFileAside(options_.file);
        if (!aside.ok()) return aside.status();
        Warn(absl::StrCat(options_.file, " is damaged (", records.status().message(),
                          "); it was set aside as ", *aside, ", and the profile starts empty"));
      } else {
        for (const PivotRecord& record : *records) Put(record);
      }
    }
    writer_ = std::thread([this] { Write(); });
    return absl::OkStatus();
  }

  void Record(const PivotModel& model, int64_t layer) {
    {
      const std::lock_guard lock(mutex_);
      Entry& entry = Touch(model);
      ++entry.counts[layer];
      dirty_ = true;
    }
    changed_.notify_all();
  }

  void Resolve(const PivotModel& model, method::PivotSpec* pivot) {
    const std::lock_guard lock(mutex_);
    const auto it = models_.find(model);
    if (it == models_.end()) return;
    it->second.used = ++clock_;
    int64_t prompts = 0;
    int64_t most = 0;
    int64_t layer = 0;
    for (const auto& [candidate, count] : it->second.counts) {
      prompts += count;
      if (count > most) {
        most = count;
        layer = candidate;
      }
    }
    if (prompts < pivot->profile_min_prompts) return;
    pivot->profiled_layer = layer;
    pivot->profiled_prompts = prompts;
  }

  absl::Status Flush() {
    // One writer at a time: the file must never go back to an older state.
    const std::lock_guard writing(write_mutex_);
    std::vector<PivotRecord> records;
    {
      const std::lock_guard lock(mutex_);
      if (!dirty_ || options_.file.empty()) return absl::OkStatus();
      dirty_ = false;
      records = Snapshot();
    }
    absl::Status status = WritePivotFile(options_.file, EncodePivotFile(records));
    bool first_failure = false;
    {
      const std::lock_guard lock(mutex_);
      first_failure = !status.ok() && !failing_;
      failing_ = !status.ok();
      if (status.ok()) ++writes_;
      if (!status.ok()) dirty_ = true;
    }
    if (first_failure) Warn(std::string(status.message()));
    return status;
  }

  int64_t models() const {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(models_.size());
  }
  int64_t writes() const {
    const std::lock_guard lock(mutex_);
    return writes_;
  }

 private:
  struct Entry {
    PivotCounts counts;
    uint64_t used = 0;
  };

  void Warn(const std::string& text) const {
    if (options_.warn) options_.warn(text);
  }

  // Under the mutex, or before there are threads:

  Entry& Touch(const PivotModel& model) {
    const auto it = models_.find(model);
    if (it == models_.end() && static_cast<int64_t>(models_.size()) >= options_.max_models) {
      models_.erase(std::min_element(
          models_.begin(), models_.end(),
          [](const auto& a, const auto& b) { return a.second.used < b.second.used; }));
    }
    Entry& entry = models_[model];
    entry.used = ++clock_;
    return entry;
  }

  void Put(const PivotRecord& record) { Touch(record.model).counts = record.counts; }

  // The one used last comes last, so that the order outlives a restart.
  std::vector<PivotRecord> Snapshot() const {
    std::vector<std::pair<uint64_t, PivotRecord>> ordered;
    ordered.reserve(models_.size());
    for (const auto& [model, entry] : models_) {
      ordered.push_back({entry.used, {model, entry.counts}});
    }
    std::sort(ordered.begin(), ordered.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<PivotRecord> records;
    records.reserve(ordered.size());
    for (auto& [used, record] : ordered) records.push_back(std::move(record));
    return records;
  }

  // The writer's thread: once something was learned it waits for more, then writes all of it.
  void Write() {
    const auto interval = absl::ToChronoNanoseconds(options_.write_interval);
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stop_ || dirty_; });
      changed_.wait_for(lock, interval, [this] { return stop_; });
      if (stop_) return;
      lock.unlock();
      const bool written = Flush().ok();
      lock.lock();
      // A disk that is full stays so for a while.
      if (!written) changed_.wait_for(lock, 10 * interval, [this] { return stop_; });
    }
  }

  const PivotProfileOptions options_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<PivotModel, Entry> models_;
  uint64_t clock_ = 0;
  bool dirty_ = false;    // something is not in the file
  bool failing_ = false;  // the last write failed
  bool stop_ = false;
  int64_t writes_ = 0;
  std::mutex write_mutex_;  // before mutex_
  std::thread writer_;
};

absl::StatusOr<std::shared_ptr<PivotProfile>> PivotProfile::Open(PivotProfileOptions options) {
  auto impl = std::make_unique<Impl>(std::move(options));
  if (absl::Status status = impl->Load(); !status.ok()) return status;
  return std::shared_ptr<PivotProfile>(new PivotProfile(std::move(impl)));
}

PivotProfile::PivotProfile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PivotProfile::~PivotProfile() = default;

void PivotProfile::Record(const engine::PromptSpec& spec, int64_t pivot_layer) {
  if (!spec.model_id.empty()) impl_->Record(ModelOf(spec), pivot_layer);
}

void PivotProfile::Resolve(engine::PromptSpec* spec) {
  if (!spec->method.has_skeleton() || spec->method.pivot.mode != method::PivotMode::kProfiled) {
    return;
  }
  impl_->Resolve(ModelOf(*spec), &spec->method.pivot);
}

absl::Status PivotProfile::Flush() { return impl_->Flush(); }
int64_t PivotProfile::models() const { return impl_->models(); }
int64_t PivotProfile::writes() const { return impl_->writes(); }

}  // namespace structkv::session
