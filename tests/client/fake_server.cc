#include "tests/client/fake_server.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "structkv/sizes.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::client {

FakeServer::FakeServer(Script script) : script_(std::move(script)) {
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.SetMaxReceiveMessageSize(-1);
  builder.RegisterService(this);
  builder.RegisterService(&regions);
  server_ = builder.BuildAndStart();
  address_ = absl::StrCat("127.0.0.1:", port);
}

FakeServer::~FakeServer() {
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
}

grpc::Status FakeServer::Compress(grpc::ServerContext* context, Stream* stream) {
  return script_(attempts_.fetch_add(1) + 1, context, stream);
}

grpc::Status FakeServer::GetCapabilities(grpc::ServerContext* /*context*/,
                                         const v1::GetCapabilitiesRequest* /*request*/,
                                         v1::GetCapabilitiesResponse* response) {
  response->set_version("1.2.3");
  response->set_region_socket(region_socket);
  response->mutable_transports()->Assign(transports.begin(), transports.end());
  return grpc::Status::OK;
}

grpc::Status FakeRegions::RegisterRegion(grpc::ServerContext* context,
                                         const v1::RegisterRegionRequest* request,
                                         v1::RegisterRegionResponse* response) {
  return on_register ? on_register(*request, response)
                     : Service::RegisterRegion(context, request, response);
}
grpc::Status FakeRegions::GetRegion(grpc::ServerContext* context,
                                    const v1::GetRegionRequest* request,
                                    v1::GetRegionResponse* response) {
  return on_get ? on_get(*request, response) : Service::GetRegion(context, request, response);
}
grpc::Status FakeRegions::UnregisterRegion(grpc::ServerContext* /*context*/,
                                           const v1::UnregisterRegionRequest* /*request*/,
                                           v1::UnregisterRegionResponse* /*response*/) {
  return grpc::Status::OK;
}

v1::Open SmallOpen() {
  v1::Open open;
  v1::ModelGeometry* geometry = open.mutable_geometry();
  geometry->set_layer_count(2);
  geometry->set_query_head_count(2);
  geometry->set_kv_head_count(1);
  geometry->set_key_dim(4);
  open.set_prompt_tokens(6);
  open.set_dtype(v1::DTYPE_F32);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.mutable_method()->mutable_snapkv()->set_granularity(v1::GRANULARITY_PER_LAYER);
  open.set_model_id("test");
  return open;
}

v1::Opened OpenedFor(const v1::Open& open) {
  v1::Opened opened;
  opened.set_session_id("session-1");
  *opened.mutable_method() = open.method();
  for (uint32_t i = 0; i < open.geometry().layer_count(); ++i) opened.add_kept_tokens(3);
  opened.add_required_tensors(v1::TENSOR_KEYS);
  opened.add_required_tensors(v1::TENSOR_VALUES);
  opened.add_required_tensors(v1::TENSOR_WINDOW_QUERIES);
  opened.set_window_tokens(2);
  opened.set_statistic(v1::STATISTIC_WINDOW_QUERIES);
  opened.set_max_request_message_bytes(4 << 20);
  opened.set_fingerprint("0123456789abcdef0123456789abcdef");
  return opened;
}

std::string TestTensor(uint32_t layer, v1::Tensor tensor, size_t bytes) {
  std::string data(bytes, '\0');
  for (size_t i = 0; i < bytes; ++i) {
    data[i] = static_cast<char>(i * 7 + (i >> 8) * 3 + layer * 31 + tensor * 101);
  }
  return data;
}

bool ReadOpen(Stream* stream, Received* received) {
  v1::CompressRequest request;
  if (!stream->Read(&request) || !request.has_open()) return false;
  received->open = request.open();
  return true;
}

void Take(const v1::CompressRequest& request, Received* received) {
  if (request.has_commit()) {
    received->commit = request.commit();
    received->committed = true;
    return;
  }
  ++received->messages;
  received->longest_message = std::max(received->longest_message, request.ByteSizeLong());
  for (const v1::TensorPiece& piece : request.pieces().pieces()) {
    std::string& tensor = received->tensors[{piece.layer(), piece.tensor()}];
    const size_t end = piece.offset_bytes() + piece.data().size();
    if (tensor.size() < end) tensor.resize(end);
    tensor.replace(piece.offset_bytes(), piece.data().size(), piece.data());
    const absl::Span<const std::byte> data(reinterpret_cast<const std::byte*>(piece.data().data()),
                                           piece.data().size());
    if (piece.has_xxh3_64() && piece.xxh3_64() == wire::Checksum(absl::MakeConstSpan(&data, 1))) {
      ++received->checksums;
    }
  }
}

void ReadToCommit(Stream* stream, Received* received) {
  v1::CompressRequest request;
  while (!received->committed && stream->Read(&request)) Take(request, received);
}

void SendOpened(Stream* stream, const v1::Opened& opened, uint32_t prompt) {
  v1::CompressResponse response;
  response.set_prompt(prompt);
  *response.mutable_opened() = opened;
  stream->Write(response);
}

v1::CompressResponse LayerResponse(const v1::Open& open, uint32_t layer, uint32_t prompt) {
  const v1::Opened opened = OpenedFor(open);
  v1::CompressResponse response;
  response.set_prompt(prompt);
  v1::LayerResult* result = response.mutable_layer();
  result->set_layer(layer);
  result->set_kept_tokens(3);
  result->mutable_metrics()->set_layer(layer);
  result->mutable_metrics()->set_entropy(1.5 + layer);
  result->set_complete(true);
  const int32_t positions[] = {0, 2, 4};
  v1::TensorPiece* piece = result->add_pieces();
  piece->set_layer(layer);
  piece->set_tensor(v1::TENSOR_POSITIONS);
  piece->set_data(positions, sizeof positions);
  for (v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
    piece = result->add_pieces();
    piece->set_layer(layer);
    piece->set_tensor(tensor);
    piece->set_data(
        TestTensor(layer + 100, tensor, OutputTensorBytes(open, opened, layer, tensor)));
  }
  return response;
}

v1::Summary SummaryFor(const v1::Open& open, const v1::Opened& opened, uint64_t input_bytes) {
  v1::Summary summary;
  const uint32_t layers = open.geometry().layer_count();
  summary.set_layer_count(layers);
  summary.set_input_bytes(input_bytes);
  uint64_t output_bytes = 0;
  for (uint32_t layer = 0; layer < layers; ++layer) {
    for (v1::Tensor tensor : {v1::TENSOR_POSITIONS, v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
      output_bytes += OutputTensorBytes(open, opened, layer, tensor);
    }
  }
  summary.set_output_bytes(output_bytes);
  summary.set_logical_length(open.prompt_tokens());
  summary.set_kv_length(opened.kept_tokens(0));
  summary.set_next_position(open.has_rotary() ? opened.kept_tokens(0) : open.prompt_tokens());
  summary.set_fingerprint(opened.fingerprint());
  return summary;
}

void SendSummary(Stream* stream, const v1::Summary& summary, uint32_t prompt) {
  v1::CompressResponse response;
  response.set_prompt(prompt);
  *response.mutable_summary() = summary;
  stream->Write(response);
}

void SendFailed(Stream* stream, uint32_t prompt, grpc::StatusCode code, const std::string& text,
                std::optional<uint64_t> retry_after_millis) {
  v1::CompressResponse response;
  response.set_prompt(prompt);
  response.mutable_failed()->set_code(code);
  response.mutable_failed()->set_message(text);
  if (retry_after_millis.has_value()) {
    response.mutable_failed()->set_retry_after_millis(*retry_after_millis);
  }
  stream->Write(response);
}

void Answer(Stream* stream, const Received& received, uint32_t prompt) {
  for (uint32_t layer = 0; layer < received.open.geometry().layer_count(); ++layer) {
    stream->Write(LayerResponse(received.open, layer, prompt));
  }
  SendSummary(stream,
              SummaryFor(received.open, OpenedFor(received.open), received.commit.input_bytes()),
              prompt);
}

grpc::Status Behave(Stream* stream, Received* received) {
  if (!ReadOpen(stream, received)) return {grpc::StatusCode::INVALID_ARGUMENT, "no open"};
  SendOpened(stream, OpenedFor(received->open));
  ReadToCommit(stream, received);
  if (!received->committed) return {grpc::StatusCode::INVALID_ARGUMENT, "no commit"};
  Answer(stream, *received);
  return grpc::Status::OK;
}

grpc::Status BehaveInBatch(Stream* stream, std::map<uint32_t, Received>* received) {
  v1::CompressRequest request;
  while (stream->Read(&request)) {
    Received& own = (*received)[request.prompt()];
    if (request.has_open()) {
      own.open = request.open();
      SendOpened(stream, OpenedFor(own.open), request.prompt());
      continue;
    }
    if (own.committed) {
      return {grpc::StatusCode::INVALID_ARGUMENT,
              absl::StrCat("a message came after `commit` of prompt ", request.prompt())};
    }
    Take(request, &own);
    if (own.committed && own.commit.layer_count() == 0) {
      SendFailed(stream, request.prompt(), grpc::StatusCode::INVALID_ARGUMENT, "commit disagrees");
    } else if (own.committed) {
      Answer(stream, own, request.prompt());
    }
  }
  return grpc::Status::OK;
}

}  // namespace structkv::client
