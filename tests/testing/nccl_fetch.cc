#include "tests/testing/nccl_fetch.h"

#include <map>
#include <string>
#include <utility>

namespace structkv::testkit {

v1::FetchCacheRequest ByPair(v1::FetchCacheRequest request, const NcclClient& client) {
  const std::vector<int> others(request.transports().begin(), request.transports().end());
  request.clear_transports();
  request.add_transports(v1::TRANSPORT_NCCL);
  for (const int other : others) request.add_transports(static_cast<v1::Transport>(other));
  request.set_nccl_pair(client.pair());
  return request;
}

NcclFetch::NcclFetch(const std::shared_ptr<grpc::Channel>& channel, NcclClient* client,
                     const v1::FetchCacheRequest& request, const Metadata& metadata)
    : request_(ByPair(request, *client)), moves_(client), stub_(v1::HeldCaches::NewStub(channel)) {
  Prepare(metadata, &context_);
  reader_ = stub_->FetchCache(&context_, request_);
}

const v1::FetchCacheResponse* NcclFetch::ReadOne() {
  v1::FetchCacheResponse response;
  if (!reader_->Read(&response)) return nullptr;
  return &responses_.emplace_back(std::move(response));
}

void NcclFetch::TakeRows(int64_t extra_bytes) {
  for (; taken_ < responses_.size(); ++taken_) {
    const v1::LayerResult& layer = responses_[taken_].layer();
    for (const v1::TensorPiece& piece : layer.pieces()) {
      if (piece.has_transfer()) announced_.push_back(piece);
    }
    if (!layer.complete() || announced_.empty()) continue;
    std::vector<std::string> buffers;
    for (const v1::TensorPiece& piece : announced_) {
      buffers.emplace_back(piece.transfer().size_bytes() + static_cast<uint64_t>(extra_bytes),
                           '\0');
    }
    moves_.Offer(announced_.front().transfer().key(), nccl::Direction::kReceive,
                 std::move(buffers));
    announced_.clear();
  }
}

Fetched NcclFetch::Finish() {
  TakeRows();
  while (ReadOne() != nullptr) TakeRows();
  const grpc::Status status = reader_->Finish();
  FetchRecord record(request_);
  std::map<std::string, size_t> next;  // buffer of a transfer
  for (v1::FetchCacheResponse& response : responses_) {
    for (int i = 0; i < response.layer().pieces_size(); ++i) {
      v1::TensorPiece* const piece = response.mutable_layer()->mutable_pieces(i);
      if (!piece->has_transfer()) continue;
      const std::string key = piece->transfer().key();
      const std::vector<std::string>* buffers = moves_.Moved(key, status.ok());
      if (buffers != nullptr) piece->set_data((*buffers)[next[key]++]);
    }
    record.Take(response);
  }
  return record.Finish(status, context_);
}

Fetched FetchByPair(const std::shared_ptr<grpc::Channel>& channel, NcclClient* client,
                    const v1::FetchCacheRequest& request, const Metadata& metadata) {
  return NcclFetch(channel, client, request, metadata).Finish();
}

}  // namespace structkv::testkit
