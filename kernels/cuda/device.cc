#include "kernels/cuda/device.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_error.h"
#include "kernels/cuda/select.h"

namespace structkv::cuda {
namespace {

// What the machine code in this build runs on (cmake/Cuda.cmake).
constexpr int kLeastMajor = 8;

}  // namespace

void Loss::Lose(absl::Status status) {
  const std::lock_guard lock(mutex_);
  if (status_.ok()) status_ = std::move(status);
}

absl::Status Loss::status() const {
  const std::lock_guard lock(mutex_);
  return status_;
}

Lease::~Lease() {
  if (lane_ == nullptr) return;
  // After an error the stream may still copy to or from what the caller is about to free.
  (void)device_->Check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
  for (PinnedSlice& slice : lane_->slices) slice.in_flight = false;
  device_->GiveBack(lane_, std::move(block_), staged_);
}

absl::StatusOr<std::unique_ptr<Device>> Device::Open(int index, const DeviceOptions& options,
                                                     Loss* loss) {
  std::unique_ptr<Device> device(new Device(index, options, loss));
  if (absl::Status status = device->Init(); !status.ok()) return status;
  return device;
}

absl::Status Device::Init() {
  name_ = absl::StrCat("GPU ", index_);
  cudaDeviceProp properties;
  if (absl::Status status =
          Check(cudaGetDeviceProperties(&properties, index_), "cudaGetDeviceProperties");
      !status.ok()) {
    return status;
  }
  model_ = properties.name;
  uuid_.assign(properties.uuid.bytes, sizeof(properties.uuid.bytes));
  if (properties.major < kLeastMajor) {
    return absl::FailedPreconditionError(
        absl::StrCat(name_, ": ", model_, " has compute capability ", properties.major, ".",
                     properties.minor, ", at least ", kLeastMajor, ".0 is needed"));
  }
  if (absl::Status status = Check(cudaSetDevice(index_), "cudaSetDevice"); !status.ok()) {
    return status;
  }
  if (absl::Status status = Check(GetSelectLimits(index_, &limits_), "cudaDeviceGetAttribute");
      !status.ok()) {
    return status;
  }
  size_t free = 0;
  size_t total = 0;
  if (absl::Status status = Check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo"); !status.ok()) {
    return status;
  }
  const int64_t bytes =
      options_.memory_bytes > 0 ? options_.memory_bytes : static_cast<int64_t>(free / 2);
  int64_t apart = options_.reserve_bytes.value_or(0);
  if (options_.reserve_bytes == 0) apart = bytes / 2;
  const int64_t least = options_.least_memory_bytes + apart;
  if (bytes < least || bytes > static_cast<int64_t>(free)) {
    return absl::ResourceExhaustedError(
        absl::StrCat(name_, ": device memory of ", bytes, " bytes, must be in [", least, ", ", free,
                     "], what is free of ", total,
                     apart == 0 ? "" : absl::StrCat("; ", apart, " of it are set apart")));
  }
  const auto whole = [](int64_t part) { return part / kPartBytes * kPartBytes; };
  DevicePool::Sizes sizes = {.apart = whole(apart)};
  if (options_.resident_share > 0) {
    sizes.resident = whole((bytes - apart) / options_.resident_share);
  }
  sizes.calls = whole(bytes - sizes.apart - sizes.resident);
  absl::StatusOr<std::shared_ptr<DevicePool>> pool = DevicePool::Make(sizes);
  if (!pool.ok()) {
    return absl::Status(pool.status().code(), absl::StrCat(name_, ": ", pool.status().message()));
  }
  pool_ = *std::move(pool);
  absl::Status status = MakeLanes();
  return status.ok() ? status
                     : absl::Status(status.code(), absl::StrCat(name_, ": ", status.message()));
}

absl::Status Device::MakeLanes() {
  for (int i = 0; i < options_.lanes; ++i) {
    auto lane = std::make_unique<Lane>();
    absl::StatusOr<Stream> stream = MakeStream();
    if (!stream.ok()) return stream.status();
    lane->stream = *std::move(stream);
    lane->slice_bytes = options_.slice_bytes;
    for (PinnedSlice& slice : lane->slices) {
      absl::StatusOr<PinnedBytes> bytes = MakePinnedBytes(options_.slice_bytes);
      if (!bytes.ok()) return bytes.status();
      slice.bytes = *std::move(bytes);
      absl::StatusOr<Event> event = MakeEvent();
      if (!event.ok()) return event.status();
      slice.copied = *std::move(event);
    }
    idle_.push_back(lane.get());
    lanes_.push_back(std::move(lane));
  }
  for (int i = 0; i < 2 * options_.lanes; ++i) {
    absl::StatusOr<Event> copied = MakeEvent();
    if (!copied.ok()) return copied.status();
    copied_.emplace_back(*std::move(copied));
  }
  absl::StatusOr<Stream> copies = MakeStream();
  if (!copies.ok()) return copies.status();
  copies_ = *std::move(copies);
  return absl::OkStatus();
}

void Device::TakeAway(Staged* staged) {
  if (!staged->block_.has_value()) return;
  taken_away_.push_back(staged->copied_);
  staged->block_.reset();
}

std::optional<Arena::Block> Device::TakeBlock(int64_t bytes, const Staged* own) {
  std::optional<Arena::Block> block = pool_->Take(bytes);
  for (Staged* const each : staged_) {
    if (block.has_value()) break;
    if (each == own || !each->finished_ || each->taken_ || !each->block_.has_value()) continue;
    TakeAway(each);
    block = pool_->Take(bytes);
  }
  return block;
}

absl::StatusOr<Lease> Device::Acquire(int64_t bytes, Staged* staged) {
  if (!CanHold(bytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat(name_, ": device memory for ", bytes, " bytes, all of it is ", pool_bytes()));
  }
  std::optional<Arena::Block> block;
  std::vector<std::shared_ptr<CUevent_st>> before;
  Lane* lane = nullptr;
  {
    std::unique_lock lock(mutex_);
    const auto is_gone = [staged] { return staged != nullptr && !staged->block_.has_value(); };
    const auto ticket = waiting_.insert(waiting_.end(), next_ticket_++);
    const auto has_turn = [&] {
      if (!loss_->status().ok() || is_gone()) return true;
      if (waiting_.front() != *ticket || idle_.empty()) return false;
      block = TakeBlock(bytes, staged);
      if (block.has_value()) return true;
      // Nothing will come back that could make room beside it.
      if (staged != nullptr && idle_.size() == lanes_.size()) TakeAway(staged);
      return is_gone();
    };
    const auto begun = std::chrono::steady_clock::now();
    const auto limit = [&] { return std::max(begun, given_back_at_) + options_.wait_limit; };
    while (!changed_.wait_until(lock, limit(), has_turn) &&
           std::chrono::steady_clock::now() < limit()) {
    }
    waiting_.erase(ticket);
    changed_.notify_all();
    if (absl::Status lost = loss_->status(); !lost.ok()) return lost;
    if (is_gone()) return absl::AbortedError("what was staged had to make room");
    if (!block.has_value()) {
      return absl::ResourceExhaustedError(
          absl::StrCat(name_, ": no device memory for ", bytes, " bytes; no call ended within ",
                       options_.wait_limit.count(), " ms, ", free_bytes(), " of ", pool_bytes(),
                       " are free, ", waiting_.size(), " calls wait"));
    }
    lane = idle_.back();
    idle_.pop_back();
    before = taken_away_;
    if (staged != nullptr) {
      staged->taken_ = true;
      before.push_back(staged->copied_);
    }
  }
  std::byte* const memory = pool_->At(*block);
  Lease lease(this, lane, *std::move(block), memory, staged);
  absl::Status status = Check(cudaSetDevice(index_), "cudaSetDevice");
  for (const std::shared_ptr<CUevent_st>& copied : before) {
    if (!status.ok()) return status;
    status = Check(cudaStreamWaitEvent(lease.stream(), copied.get(), 0), "cudaStreamWaitEvent");
  }
  if (!status.ok()) return status;
  return lease;
}

std::unique_ptr<Staged> Device::TryStage(int64_t bytes) {
  std::unique_ptr<Staged> staged;
  {
    const std::lock_guard lock(mutex_);
    const auto free = std::find_if(copied_.begin(), copied_.end(),
                                   [](const auto& copied) { return copied.use_count() == 1; });
    if (!waiting_.empty() || free == copied_.end() || !loss_->status().ok()) return nullptr;
    std::optional<Arena::Block> block = pool_->Take(bytes);
    if (!block.has_value()) return nullptr;
    std::byte* const memory = pool_->At(*block);
    staged.reset(new Staged(this, *std::move(block), memory, *free));
    staged_.push_back(staged.get());
  }
  return Check(cudaSetDevice(index_), "cudaSetDevice").ok() ? std::move(staged) : nullptr;
}

bool Device::Finished(const Staged& staged) {
  const std::lock_guard lock(mutex_);
  return staged.finished_;
}

void Device::Finish(Staged* staged) {
  const std::lock_guard lock(mutex_);
  staged->finished_ = true;
  changed_.notify_all();
}

void Device::GiveBack(Staged* staged) {
  const std::lock_guard lock(mutex_);
  staged_.remove(staged);
  std::erase(taken_away_, staged->copied_);
  staged->block_.reset();
  changed_.notify_all();
}

absl::StatusOr<std::shared_ptr<std::byte>> Device::Reserve(int64_t bytes) {
  std::shared_ptr<std::byte> memory = pool_->TakeApart(bytes);
  if (memory != nullptr) return memory;
  return absl::ResourceExhaustedError(absl::StrCat(name_, ": no device memory to reserve for ",
                                                   bytes, " bytes; ", free_apart_bytes(), " of ",
                                                   apart_bytes(), " are free"));
}

int64_t Device::reservable_bytes() const { return LargestBlock(apart_bytes()); }

void Device::GiveBack(Lane* lane, Arena::Block block, Staged* staged) {
  const std::lock_guard lock(mutex_);
  { const Arena::Block given = std::move(block); }
  if (staged != nullptr) TakeAway(staged);
  idle_.push_back(lane);
  given_back_at_ = std::chrono::steady_clock::now();
  changed_.notify_all();
}

absl::Status Device::Check(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  absl::Status status = CudaStatus(error, absl::StrCat(name_, ": ", std::string(what)));
  if (IsSticky(error)) {
    loss_->Lose(status);
    const std::lock_guard lock(mutex_);
    changed_.notify_all();
  }
  return status;
}

}  // namespace structkv::cuda
