#include "tests/session/fault_backend.h"

#include <chrono>
#include <string>
#include <utility>

#include "tests/kernels/forwarding_backend.h"

namespace structkv::session {
namespace {

class FaultBackend final : public testing::ForwardingBackend {
 public:
  FaultBackend(std::unique_ptr<Backend> real, std::shared_ptr<Faults> faults)
      : ForwardingBackend(std::move(real)), faults_(std::move(faults)) {}

  absl::Status Health() const override { return faults_->Health(); }
  absl::Status Saliency(const SaliencyParams& params, float* out, BadStatistic* bad,
                        ParallelFor parallel) const override {
    faults_->Pass(params.keys.tokens);
    absl::Status status = faults_->SaliencyStatus(params.keys.tokens);
    return status.ok() ? real().Saliency(params, out, bad, parallel) : status;
  }
  std::optional<BadStatistic> FindBad(const float* values, int64_t heads, int64_t tokens,
                                      ParallelFor parallel) const override {
    faults_->Pass(tokens);
    return real().FindBad(values, heads, tokens, parallel);
  }
  absl::Status Gather(const TensorView& source, const int32_t* positions, bool per_head,
                      const MutableTensorView& destination, ParallelFor parallel) const override {
    faults_->Pass(source.tokens);
    return real().Gather(source, positions, per_head, destination, parallel);
  }
  absl::Status GatherRotated(const TensorView& source, const int32_t* rows, bool per_head,
                             const RotationParams& rotation, const MutableTensorView& destination,
                             ParallelFor parallel) const override {
    faults_->Pass(source.tokens);
    return real().GatherRotated(source, rows, per_head, rotation, destination, parallel);
  }

 private:
  const std::shared_ptr<Faults> faults_;
};

}  // namespace

void Faults::CloseGate(int64_t tokens) {
  const std::lock_guard lock(mutex_);
  rules_[tokens].closed = true;
}

void Faults::OpenGate(int64_t tokens) {
  const std::lock_guard lock(mutex_);
  rules_[tokens].closed = false;
  changed_.notify_all();
}

void Faults::OpenAllGates() {
  const std::lock_guard lock(mutex_);
  for (auto& [tokens, rule] : rules_) rule.closed = false;
  changed_.notify_all();
}

bool Faults::WaitUntilBlocked(int64_t tokens, int layers) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::minutes(1),
                           [&] { return rules_[tokens].blocked >= layers; });
}

void Faults::FailSaliency(int64_t tokens, int64_t calls, absl::Status status) {
  const std::lock_guard lock(mutex_);
  rules_[tokens].calls_left = calls;
  rules_[tokens].failure = std::move(status);
}

void Faults::Pass(int64_t tokens) {
  std::unique_lock lock(mutex_);
  Rule& rule = rules_[tokens];  // a map's nodes stay where they are
  if (!rule.closed) return;
  ++rule.blocked;
  changed_.notify_all();
  changed_.wait(lock, [&] { return !rule.closed; });
  --rule.blocked;
}

absl::Status Faults::SaliencyStatus(int64_t tokens) {
  const std::lock_guard lock(mutex_);
  Rule& rule = rules_[tokens];
  if (rule.failure.ok() || rule.calls_left-- > 0) return absl::OkStatus();
  return rule.failure;
}

void Faults::Lose(absl::Status status) {
  const std::lock_guard lock(mutex_);
  health_ = std::move(status);
}

absl::Status Faults::Health() {
  const std::lock_guard lock(mutex_);
  return health_;
}

std::unique_ptr<Backend> MakeFaultBackend(std::unique_ptr<Backend> real,
                                          std::shared_ptr<Faults> faults) {
  return std::make_unique<FaultBackend>(std::move(real), std::move(faults));
}

}  // namespace structkv::session
