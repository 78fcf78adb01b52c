// The library's end of NCCL: a GPU's thread, and the pairs that it has with servers.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cpp/nccl_stream.h"
#include "grpcpp/channel.h"
#include "service/transport/nccl/device_api.h"
#include "service/transport/nccl/inbox.h"
#include "service/transport/nccl/nccl_api.h"
#include "service/transport/nccl/worker.h"
#include "structkv/nccl.h"

namespace structkv::client::internal {

// What is behind an NcclGpu. Thread-safe.
class NcclDevice {
 public:
  // Starts its thread. `host`: of nccl::Identity.
  static absl::StatusOr<std::unique_ptr<NcclDevice>> Start(std::shared_ptr<const nccl::Api> api,
                                                           const nccl::DeviceApi& device_api,
                                                           nccl::WorkerOptions options,
                                                           std::string host,
                                                           absl::Duration attach_limit);

  nccl::Worker* worker() const { return worker_.get(); }
  const nccl::Identity& identity() const { return identity_; }
  absl::Duration attach_limit() const { return attach_limit_; }

 private:
  NcclDevice() = default;

  std::unique_ptr<nccl::Worker> worker_;
  nccl::Identity identity_;
  absl::Duration attach_limit_;
};

// A GPU's pair with a server's, and the thread that takes what it brought to the sessions.
// Thread-safe; not to be destroyed on one of gRPC's threads or on the GPU's.
class NcclPair {
 public:
  // As NcclStream::Attach, until `deadline` at most, with UNAVAILABLE in the place of
  // DEADLINE_EXCEEDED.
  static absl::StatusOr<std::shared_ptr<NcclPair>> Attach(std::shared_ptr<grpc::Channel> channel,
                                                          std::shared_ptr<NcclGpu> gpu,
                                                          const std::string& tenant,
                                                          absl::Time deadline);
  ~NcclPair();
  NcclPair(const NcclPair&) = delete;
  NcclPair& operator=(const NcclPair&) = delete;

  // At the service (`Open.nccl_pair`).
  uint64_t name() const { return stream_->pair(); }
  const NcclGpu* gpu() const { return gpu_.get(); }
  void Offer(const std::string& key, nccl::Transfer transfer) {
    stream_->Offer(key, std::move(transfer));
  }
  void Withdraw(const std::string& key) { stream_->Withdraw(key); }
  // What the pair's thread is to call.
  const std::shared_ptr<nccl::Inbox>& calls() const { return calls_; }
  // Before the end: how long the service may take for its part of that.
  void LimitLeaving(absl::Duration limit) { stream_->LimitLeaving(limit); }
  // A transfer was told that it has; another pair is to be attached.
  void MarkEnded() { ended_.store(true); }
  bool ended() const { return ended_.load(); }

 private:
  NcclPair(std::shared_ptr<NcclGpu> gpu, std::unique_ptr<NcclStream> stream);

  const std::shared_ptr<NcclGpu> gpu_;
  std::unique_ptr<NcclStream> stream_;
  std::atomic<bool> ended_ = false;
  const std::shared_ptr<nccl::Inbox> calls_ = std::make_shared<nccl::Inbox>();
  const std::shared_ptr<bool> over_ = std::make_shared<bool>(false);  // the thread's
  std::thread thread_;
};

}  // namespace structkv::client::internal
