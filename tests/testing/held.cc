#include "tests/testing/held.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace structkv::testkit {

void Prepare(const Metadata& metadata, grpc::ClientContext* context) {
  for (const auto& [key, value] : metadata) context->AddMetadata(key, value);
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
}

v1::Open Held(v1::Open open) {
  open.set_output(v1::OUTPUT_HOLD);
  return open;
}

FetchCall::FetchCall(const std::shared_ptr<grpc::Channel>& channel,
                     const v1::FetchCacheRequest& request, const Metadata& metadata,
                     const SharedFile* region)
    : stub_(v1::HeldCaches::NewStub(channel)), record_(request, region) {
  Prepare(metadata, &context_);
  reader_ = stub_->FetchCache(&context_, request);
}

bool FetchCall::ReadOne() {
  v1::FetchCacheResponse response;
  if (!reader_->Read(&response)) return false;
  record_.Take(response);
  return true;
}

void FetchRecord::Take(const v1::FetchCacheResponse& response) {
  ++fetched_.messages;
  fetched_.longest_message = std::max(fetched_.longest_message, response.ByteSizeLong());
  const auto fault = [this](const std::string& text) { fetched_.faults.push_back(text); };
  if (fetched_.summary) fault("a message after the summary");
  if (response.has_info() == fetched_.info.has_value()) fault("not one info, first");
  if (response.has_info()) {
    fetched_.info = response.info();
  } else if (response.has_summary()) {
    fetched_.summary = response.summary();
    if (response.summary().sent_bytes() != fetched_.bytes.size()) fault("sent_bytes");
    const bool all = response.summary().total_bytes() == fetched_.bytes.size() + skip_;
    if (!all && !info_only_) fault("total_bytes");
  } else if (response.has_layer()) {
    const v1::LayerResult& result = response.layer();
    if (!fetched_.layers.empty() && fetched_.layers.rbegin()->first > result.layer()) {
      fault("layers out of order");
    }
    const bool first = !fetched_.layers.contains(result.layer());
    LayerAnswer& layer = fetched_.layers[result.layer()];
    layer.kept_tokens = result.kept_tokens();
    layer.kept_blocks = result.kept_blocks();
    if (result.has_metrics() && !first) fault("metrics past the first message");
    if (result.has_metrics()) layer.metrics = result.metrics();
    for (const v1::TensorPiece& piece : result.pieces()) {
      std::string& bytes = layer.tensors[piece.tensor()];
      if (skip_ == 0 && piece.offset_bytes() != bytes.size()) {
        fault(absl::StrCat("a piece out of order in layer ", result.layer()));
      }
      std::string data = piece.data();
      fetched_.message_bytes += data.size();
      if (piece.has_range()) {
        const v1::RegionRange& range = piece.range();
        if (region_ == nullptr || range.region() != 0 || range.size_bytes() > region_->size() ||
            range.offset_bytes() > region_->size() - range.size_bytes()) {
          fault("a range that is none");
          continue;
        }
        data.assign(region_->data() + range.offset_bytes(), range.size_bytes());
      }
      bytes += data;
      fetched_.bytes += data;
    }
  } else {
    fault("a message with nothing set");
  }
}

Fetched FetchCall::Finish() {
  while (ReadOne()) {
  }
  return record_.Finish(reader_->Finish(), context_);
}

Fetched FetchRecord::Finish(const grpc::Status& status, const grpc::ClientContext& context) {
  fetched_.status = status;
  for (const auto& [key, value] : context.GetServerTrailingMetadata()) {
    fetched_.trailers.emplace(std::string(key.data(), key.size()),
                              std::string(value.data(), value.size()));
  }
  if (fetched_.status.ok() != fetched_.summary.has_value()) {
    fetched_.faults.emplace_back("OK and a summary do not come together");
  }
  return std::move(fetched_);
}

Fetched Fetch(const std::shared_ptr<grpc::Channel>& channel, const v1::FetchCacheRequest& request,
              const Metadata& metadata, const SharedFile* region) {
  return FetchCall(channel, request, metadata, region).Finish();
}

v1::FetchCacheRequest Into(v1::FetchCacheRequest request, const std::string& region,
                           const SharedFile& file, uint64_t offset) {
  request.add_transports(v1::TRANSPORT_SHARED_MEMORY);
  request.add_regions(region);
  request.mutable_result_range()->set_offset_bytes(offset);
  request.mutable_result_range()->set_size_bytes(file.size() - offset);
  return request;
}

v1::FetchCacheRequest FetchRequest(const std::string& handle) {
  v1::FetchCacheRequest request;
  request.set_handle(handle);
  return request;
}

grpc::Status Renew(const std::shared_ptr<grpc::Channel>& channel, const std::string& handle,
                   const Metadata& metadata, std::optional<uint64_t> lease_millis,
                   uint64_t* in_force) {
  grpc::ClientContext context;
  Prepare(metadata, &context);
  v1::RenewCacheRequest request;
  request.set_handle(handle);
  if (lease_millis.has_value()) request.set_lease_millis(*lease_millis);
  v1::RenewCacheResponse response;
  const grpc::Status status =
      v1::HeldCaches::NewStub(channel)->RenewCache(&context, request, &response);
  if (in_force != nullptr) *in_force = response.lease_millis();
  return status;
}

grpc::Status Release(const std::shared_ptr<grpc::Channel>& channel, const std::string& handle,
                     const Metadata& metadata) {
  grpc::ClientContext context;
  Prepare(metadata, &context);
  v1::ReleaseCacheRequest request;
  request.set_handle(handle);
  v1::ReleaseCacheResponse response;
  return v1::HeldCaches::NewStub(channel)->ReleaseCache(&context, request, &response);
}

std::map<v1::Tensor, std::string> HeadsOf(const v1::Open& open, const LayerAnswer& layer,
                                          uint32_t heads, const v1::HeadRange& range) {
  const bool heads_first = open.layout() == v1::LAYOUT_HEAD_TOKEN_DIM;
  uint64_t runs = heads_first ? 1 : layer.kept_tokens;
  if (open.has_paged()) {
    runs = heads_first ? layer.kept_blocks : layer.kept_blocks * open.paged().block_tokens();
  }
  std::map<v1::Tensor, std::string> sliced;
  for (const auto& [tensor, bytes] : layer.tensors) {
    switch (tensor) {
      case v1::TENSOR_SALIENCY:
        break;
      case v1::TENSOR_KEYS:
      case v1::TENSOR_VALUES:
        sliced[tensor] = SliceHeads(bytes, runs, heads, range);
        break;
      case v1::TENSOR_POSITIONS:
        sliced[tensor] = Effective(open).per_head ? SliceHeads(bytes, 1, heads, range) : bytes;
        break;
      default:
        sliced[tensor] = open.kv_scales() == v1::KV_SCALES_PER_KV_HEAD
                             ? SliceHeads(bytes, 1, heads, range)
                             : bytes;
    }
  }
  return sliced;
}

}  // namespace structkv::testkit
