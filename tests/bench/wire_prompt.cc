#include "tests/bench/wire_prompt.h"

#include "structkv/v1/piece_codec.h"
#include "tests/bench/wire_bare.h"
#include "tests/bench/wire_peer.h"

namespace structkv::bench {

v1::Open PlanOpen(uint32_t layers, uint32_t tokens) {
  v1::Open open;
  open.mutable_geometry()->set_layer_count(layers);
  open.mutable_geometry()->set_query_head_count(32);
  open.mutable_geometry()->set_kv_head_count(8);
  open.mutable_geometry()->set_key_dim(128);
  open.set_prompt_tokens(tokens);
  open.set_dtype(v1::DTYPE_BF16);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.set_statistic(v1::STATISTIC_SALIENCY);
  open.set_output(v1::OUTPUT_PLAN);
  return open;
}

std::vector<float> Saliency(size_t count) {
  std::vector<float> saliency(count);
  uint32_t state = 1;
  for (float& value : saliency) {
    state = state * 1664525 + 1013904223;
    value = static_cast<float>(state >> 8) / static_cast<float>(1 << 24);
  }
  return saliency;
}

void CompressPrompt(const std::shared_ptr<grpc::Channel>& channel, const v1::Open& open,
                    absl::Span<const std::byte> saliency, uint64_t piece_bytes, uint32_t warm_up,
                    Sample* sample) {
  const uint32_t layers = open.geometry().layer_count();
  grpc::ClientContext context;
  const auto stream = StartStream(channel, kCompressMethod, &context);
  v1::CompressRequest request;
  *request.mutable_open() = open;
  grpc::ByteBuffer answer;
  if (!stream->Write(wire::Encode(request)) || !stream->Read(&answer)) {
    FinishOrDie(stream.get(), "Compress");
    Die("Compress: not opened");
  }
  const wire::Keepalive owner(saliency.data(), [](const void*) {});
  for (uint32_t layer = 0; layer < layers; ++layer) {
    sample->request_bytes = 0;
    sample->answer_bytes = 0;
    const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
    for (uint64_t at = 0; at < saliency.size(); at += piece_bytes) {
      wire::OutgoingPiece piece;
      piece.owner = owner;
      piece.layer = layer;
      piece.tensor = v1::TENSOR_SALIENCY;
      piece.offset_bytes = at;
      piece.data = saliency.subspan(at, piece_bytes);
      const grpc::ByteBuffer message = wire::EncodeRequest({&piece, 1});
      if (!stream->Write(message)) FinishOrDie(stream.get(), "Compress");
      sample->request_bytes += message.Length();
    }
    bool complete = false;
    while (!complete) {
      if (!stream->Read(&answer)) FinishOrDie(stream.get(), "Compress");
      const absl::StatusOr<wire::Response> response = wire::DecodeResponse(answer);
      if (!response.ok()) Die("Compress: an answer cannot be read");
      complete = response->message.layer().complete();
      if (!response->message.has_pivot()) sample->answer_bytes += answer.Length();
    }
    const double micros = MicrosSince(start);
    if (layer >= warm_up) sample->micros.push_back(micros);
  }
  v1::CompressRequest commit;
  commit.mutable_commit()->set_layer_count(layers);
  commit.mutable_commit()->set_input_bytes(layers * saliency.size());
  stream->Write(wire::Encode(commit));
  stream->WritesDone();
  while (stream->Read(&answer)) {
  }
  FinishOrDie(stream.get(), "Compress");
}

}  // namespace structkv::bench
