// A client whose keys and values travel by an NCCL pair, that of the fake library: the bare
// protocol over NcclStream. Shares nothing else with client/cpp.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "client/cpp/nccl_stream.h"
#include "grpcpp/channel.h"
#include "tests/testing/answer.h"
#include "tests/testing/call.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

// Limits that a slow machine does not come near, or (`impatient`) that faults meet soon; heartbeats
// fit both. For servers as for clients.
nccl::WorkerOptions NcclWorkerOptions(bool impatient = false);

// A GPU that is attached to a server. Its memory is the host's.
class NcclClient {
 public:
  // `name` stands for the host. Ends the program where attaching fails.
  NcclClient(const std::shared_ptr<grpc::Channel>& channel, const std::string& name,
             const std::string& tenant = "",
             const nccl::WorkerOptions& options = NcclWorkerOptions());

  uint64_t pair() const { return stream_->pair(); }
  // Nothing is offered or withdrawn once the pair has ended.
  void Offer(const std::string& key, nccl::Transfer transfer) {
    if (stream_ != nullptr) stream_->Offer(key, std::move(transfer));
  }
  void Withdraw(const std::string& key) {
    if (stream_ != nullptr) stream_->Withdraw(key);
  }
  // Ends the pair.
  void Detach() { stream_.reset(); }

 private:
  std::unique_ptr<nccl::Worker> worker_;
  std::unique_ptr<client::internal::NcclStream> stream_;
};

// Transfers of such a pair, and what they moved.
class NcclMoves {
 public:
  // `client` outlives it.
  explicit NcclMoves(NcclClient* client) : client_(*client) {}
  // Takes back what was not transferred.
  ~NcclMoves();
  NcclMoves(const NcclMoves&) = delete;
  NcclMoves& operator=(const NcclMoves&) = delete;

  void Offer(const std::string& key, nccl::Direction direction, std::vector<std::string> buffers);
  // What lies in the buffers of a transfer that has ended well, which is waited for with `wait`.
  // Null where it has not, or there is none.
  const std::vector<std::string>* Moved(const std::string& key, bool wait) const;

 private:
  struct Move;

  NcclClient& client_;
  std::map<std::string, std::shared_ptr<Move>> moves_;  // by key
};

// One run of a prompt by such a pair. `data` and `client` outlive it.
class NcclPrompt {
 public:
  NcclPrompt(const PromptData& data, NcclClient* client);

  // All of AllMessages(), with transfers in the place of keys and values; offers nothing.
  std::vector<v1::CompressRequest> Messages() const;
  // Offers the keys and values of a layer; of other lengths where `extra_bytes` is not 0.
  void Offer(uint32_t layer, int64_t extra_bytes = 0);
  // Offers room for the rows that an answer of the server tells of.
  void Take(const v1::CompressResponse& response);

  // The same of those that have come to a call and were not taken yet.
  void TakeAll(Call* call);

  // Sends all and takes what comes, as a good client does; the answers have data in the place of
  // transfers.
  Outcome Run(const std::shared_ptr<grpc::Channel>& channel);
  // The rest of that, of a call to which everything was sent.
  Outcome Finish(Call* call);
  // Answers with the data of transfers, which are waited for.
  Outcome Get(Outcome outcome);

  std::string Key(uint32_t layer) const { return key_ + std::to_string(layer); }

 private:
  const PromptData& data_;
  NcclClient& client_;
  const std::string key_;  // what its keys begin with
  NcclMoves moves_;
  std::map<uint32_t, std::vector<v1::TensorPiece>> announced_;  // of answers that are not complete
  size_t taken_ = 0;                                            // answers of a call
};

}  // namespace structkv::testkit
