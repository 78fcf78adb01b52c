#include "tests/bench/wire_nccl.h"

#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/driver_device_api.h"
#include "service/transport/nccl/nccl_api.h"
#include "service/transport/nccl/worker_options.h"
#include "structkv/region.h"
#include "tests/bench/wire_prompt.h"

namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kLimit = std::chrono::seconds(60);  // of one step; connecting takes seconds

// One GPU's end; all of it on one thread, but for the constructor.
class End {
 public:
  End(std::shared_ptr<const nccl::Api> api, const nccl::DeviceApi& device, int rank,
      std::shared_ptr<client::Region> memory)
      : api_(std::move(api)), device_(device), rank_(rank), memory_(std::move(memory)) {}
  ~End() {
    if (comm_ != nullptr) api_->call().comm_abort(comm_);
    if (stream_ != nullptr) device_.destroy_stream(stream_);
  }
  End(const End&) = delete;
  End& operator=(const End&) = delete;

  absl::Status Connect(const nccl::UniqueId& id) {
    absl::Status status = device_.set_device(memory_->options().gpu);
    if (!status.ok()) return status;
    auto stream = device_.create_stream();
    if (!stream.ok()) return stream.status();
    stream_ = *stream;
    nccl::Config config;
    config.blocking = 0;
    config.max_ctas = nccl::WorkerOptions().max_channels;
    status = api_->ToStatus(api_->call().comm_init_rank_config(&comm_, 2, id, rank_, &config),
                            "ncclCommInitRankConfig", comm_);
    return status.ok() ? WaitForNccl("connecting") : status;
  }

  // Sends or receives from the begin of the memory, and waits for that.
  absl::Status Move(bool send, uint64_t bytes) {
    const nccl::Functions& call = api_->call();
    absl::Status status = api_->ToStatus(call.group_start(), "ncclGroupStart", comm_);
    if (!status.ok()) return status;
    const int peer = 1 - rank_;
    const nccl::Result result =
        send ? call.send(memory_->data(), bytes, nccl::kBytes, peer, comm_, stream_)
             : call.receive(memory_->data(), bytes, nccl::kBytes, peer, comm_, stream_);
    status.Update(api_->ToStatus(result, send ? "ncclSend" : "ncclRecv", comm_));
    status.Update(api_->ToStatus(call.group_end(), "ncclGroupEnd", comm_));
    if (status.ok()) status = WaitForNccl("posting");
    return status.ok() ? WaitForStream() : status;
  }

  absl::Status Close() {
    absl::Status status = api_->ToStatus(api_->call().comm_finalize(comm_), "finalize", comm_);
    if (status.ok()) status = WaitForNccl("closing");
    if (!status.ok()) return status;
    return api_->ToStatus(api_->call().comm_destroy(std::exchange(comm_, nullptr)), "destroy");
  }

 private:
  absl::Status WaitForNccl(const char* what) {
    const Clock::time_point end = Clock::now() + kLimit;
    for (;;) {
      nccl::Result error = nccl::Result::kSuccess;
      absl::Status status =
          api_->ToStatus(api_->call().comm_get_async_error(comm_, &error), what, comm_);
      status.Update(api_->ToStatus(error, what, comm_));
      if (!status.ok() || error == nccl::Result::kSuccess) return status;
      if (Clock::now() >= end) return absl::DeadlineExceededError(absl::StrCat(what, " hangs"));
      std::this_thread::yield();
    }
  }

  absl::Status WaitForStream() {
    const Clock::time_point end = Clock::now() + kLimit;
    for (;;) {
      const absl::StatusOr<bool> done = device_.stream_done(stream_);
      if (!done.ok()) return done.status();
      if (*done) return absl::OkStatus();
      if (Clock::now() >= end) return absl::DeadlineExceededError("a transfer hangs");
      std::this_thread::yield();
    }
  }

  const std::shared_ptr<const nccl::Api> api_;
  const nccl::DeviceApi device_;
  const int rank_;
  const std::shared_ptr<client::Region> memory_;
  nccl::Comm* comm_ = nullptr;
  nccl::Stream* stream_ = nullptr;
};

// One round trip of rank 0, which begins it, or of rank 1.
absl::Status MoveBothWays(const BareNcclOptions& options, int rank, End* end) {
  absl::Status status = end->Move(rank == 0, options.there_bytes);
  if (status.ok() && options.back_bytes > 0) status = end->Move(rank == 1, options.back_bytes);
  return status;
}

absl::StatusOr<std::vector<double>> RunEnd(const BareNcclOptions& options, int rank, End* end,
                                           const nccl::UniqueId& id) {
  absl::Status status = end->Connect(id);
  if (!status.ok()) return status;
  std::vector<double> micros;
  for (uint32_t i = 0; i <= options.count; ++i) {
    const Clock::time_point start = Clock::now();
    status = MoveBothWays(options, rank, end);
    if (!status.ok()) return status;
    if (i > 0) micros.push_back(MicrosSince(start));
  }
  status = end->Close();
  if (!status.ok()) return status;
  return micros;
}

}  // namespace

absl::StatusOr<std::vector<double>> BareNcclMicros(const BareNcclOptions& options) {
  const auto api = nccl::Api::Load(options.nccl_library);
  if (!api.ok()) return api.status();
  std::vector<std::unique_ptr<End>> ends;
  for (const int gpu : {options.near, options.far}) {
    const auto device = client::internal::DriverDeviceApi(options.cuda_library, gpu);
    if (!device.ok()) return device.status();
    client::RegionOptions region;
    region.size_bytes = std::max(options.there_bytes, options.back_bytes);
    region.kind = client::RegionKind::kGpu;
    region.gpu = gpu;
    region.cuda_library = options.cuda_library;
    auto memory = client::Region::Create(region);
    if (!memory.ok()) return memory.status();
    ends.push_back(
        std::make_unique<End>(*api, *device, static_cast<int>(ends.size()), *std::move(memory)));
  }
  nccl::UniqueId id;
  absl::Status status = (*api)->ToStatus((*api)->call().get_unique_id(&id), "ncclGetUniqueId");
  if (!status.ok()) return status;
  auto far = std::async(std::launch::async, [&] {
    const std::unique_ptr<End> end = std::move(ends[1]);
    return RunEnd(options, 1, end.get(), id);
  });
  auto near = std::async(std::launch::async, [&] {
    const std::unique_ptr<End> end = std::move(ends[0]);
    return RunEnd(options, 0, end.get(), id);
  });
  const absl::Status other = far.get().status();
  absl::StatusOr<std::vector<double>> micros = near.get();
  if (micros.ok() && !other.ok()) return other;
  return micros;
}

}  // namespace structkv::bench
