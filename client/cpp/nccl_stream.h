// The NCCL control stream of a client: gRPC's callback API between a ClientPair and the service.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/client_callback.h"
#include "service/transport/nccl/client_pair.h"
#include "structkv/v1/nccl.grpc.pb.h"

namespace structkv::client::internal {

// The call. Thread-safe. Its pair's channel refers to it weakly: the pair may live longer, in the
// callbacks of its worker.
class NcclCall final : public grpc::ClientBidiReactor<v1::AttachRequest, v1::AttachResponse> {
 public:
  void Start(grpc::Channel* channel, std::shared_ptr<nccl::ClientPair> pair,
             const std::string& tenant);
  // Dropped after Finish.
  void Send(const nccl::ClientMessage& message);
  // Half-closes once all is written.
  void Finish();
  // Returns after the last callback; cancels the call after `limit`.
  void WaitUntilDone(absl::Duration limit);

 private:
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

  // Starts the next write, or the half-close, where it is time for one.
  void Advance();

  grpc::ClientContext context_;
  std::shared_ptr<nccl::ClientPair> pair_;
  v1::AttachResponse incoming_;  // the outstanding read's

  absl::Mutex mutex_;
  std::deque<v1::AttachRequest> queue_ ABSL_GUARDED_BY(mutex_);  // the front one is being written
  bool started_ ABSL_GUARDED_BY(mutex_) = false;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool finishing_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;  // the hold is released
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
};

// Thread-safe. Must not be destroyed on one of gRPC's threads or on the worker's.
class NcclStream {
 public:
  // How long the service may take to end a stream that the client has ended.
  static constexpr absl::Duration kLeaveLimit = absl::Seconds(1);

  // Attaches a GPU to the service's. Waits up to `limit` for the service's word: DEADLINE_EXCEEDED,
  // or why it refused. `worker` lives longer. The pair is `tenant`'s.
  static absl::StatusOr<std::unique_ptr<NcclStream>> Attach(
      std::shared_ptr<grpc::Channel> channel, nccl::Worker* worker, const nccl::Identity& identity,
      absl::Duration limit, const std::string& tenant = "",
      absl::Duration leave_limit = kLeaveLimit);
  // Ends the pair, and waits for the end of the call, `leave_limit` for the service's part of it.
  ~NcclStream();

  // Before the end: no longer than that.
  void LimitLeaving(absl::Duration limit) { leave_limit_ = std::min(leave_limit_, limit); }

  // The pair's name at the service.
  uint64_t pair() const { return name_; }
  // See nccl::ClientPair::Offer.
  void Offer(const std::string& key, nccl::Transfer transfer) {
    pair_->Offer(key, std::move(transfer));
  }
  // See nccl::ClientPair::Withdraw.
  void Withdraw(const std::string& key) { pair_->Withdraw(key); }

 private:
  explicit NcclStream(absl::Duration leave_limit) : leave_limit_(leave_limit) {}

  std::shared_ptr<grpc::Channel> channel_;
  std::shared_ptr<NcclCall> call_ = std::make_shared<NcclCall>();
  std::shared_ptr<nccl::ClientPair> pair_;
  absl::Duration leave_limit_;
  uint64_t name_ = 0;
};

}  // namespace structkv::client::internal
