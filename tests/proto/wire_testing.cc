#include "tests/proto/wire_testing.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <variant>
#include <vector>

namespace structkv::wire::testing {
namespace {

using testkit::Random;

v1::TensorPiece ToProto(const Piece& piece) {
  v1::TensorPiece message;
  message.set_layer(piece.layer);
  message.set_tensor(static_cast<v1::Tensor>(piece.tensor));
  message.set_offset_bytes(piece.offset_bytes);
  if (piece.xxh3_64.has_value()) message.set_xxh3_64(*piece.xxh3_64);
  if (piece.range.has_value()) {
    message.mutable_range()->set_region(piece.range->region);
    message.mutable_range()->set_offset_bytes(piece.range->offset_bytes);
    message.mutable_range()->set_size_bytes(piece.range->size_bytes);
    return message;
  }
  if (piece.transfer.has_value()) {
    message.mutable_transfer()->set_key(piece.transfer->key);
    message.mutable_transfer()->set_size_bytes(piece.transfer->size_bytes);
    return message;
  }
  std::string* data = message.mutable_data();
  for (const absl::Span<const std::byte> run : piece.data) {
    data->append(reinterpret_cast<const char*>(run.data()), run.size());
  }
  return message;
}

template <typename Repeated>
void DropEmptyData(Repeated* pieces) {
  for (v1::TensorPiece& piece : *pieces) {
    const bool elsewhere = piece.has_range() || piece.has_transfer();
    if (!elsewhere && piece.data().empty()) piece.clear_source();
  }
}

// Small numbers, and those at the ends of their range.
uint64_t RandomNumber(Random* random, uint64_t most) {
  switch (random->Between(0, 3)) {
    case 0:
      return 0;
    case 1:
      return most;
    case 2:
      return random->Next() & most;
    default:
      return static_cast<uint64_t>(random->Between(1, 300)) & most;
  }
}

std::string RandomBytes(Random* random, size_t size) {
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random->Next());
  return bytes;
}

template <typename Message>
void AddRandomPieces(Random* random, Message* message) {
  const int64_t pieces = random->Between(0, 6);
  for (int64_t i = 0; i < pieces; ++i) *message->add_pieces() = RandomPiece(random);
}

void FillMetrics(Random* random, v1::LayerMetrics* metrics) {
  metrics->set_layer(static_cast<uint32_t>(random->Between(0, 100)));
  metrics->set_entropy(static_cast<double>(random->Between(0, 1000)) / 7);
  metrics->set_variance(static_cast<double>(random->Between(0, 1000)) / 7);
  if (random->Chance(50)) metrics->set_transition(0.25);
}

void FillOpened(Random* random, v1::Opened* opened) {
  opened->set_session_id("session");
  for (int i = 0; i < 5; ++i) opened->add_kept_tokens(static_cast<uint32_t>(random->Next()));
  opened->add_required_tensors(v1::TENSOR_KEYS);
  opened->mutable_method()->mutable_snapkv()->set_window_tokens(32);
  opened->set_reserved_bytes(random->Next());
}

void FillLayer(Random* random, v1::LayerResult* layer) {
  layer->set_layer(static_cast<uint32_t>(RandomNumber(random, UINT32_MAX)));
  layer->set_kept_tokens(static_cast<uint32_t>(random->Between(0, 5000)));
  if (random->Chance(50)) FillMetrics(random, layer->mutable_metrics());
  layer->set_complete(random->Chance(50));
  AddRandomPieces(random, layer);
}

void FillPivot(Random* random, v1::PivotDecision* pivot) {
  pivot->set_pivot_layer(static_cast<uint32_t>(random->Between(0, 40)));
  if (random->Chance(50)) pivot->set_transition_layer(7);
  pivot->set_mode(v1::PIVOT_MODE_EXACT);
  const int64_t layers = random->Between(0, 40);
  for (int64_t i = 0; i < layers; ++i) FillMetrics(random, pivot->add_layers());
  pivot->set_complete(random->Chance(50));
  AddRandomPieces(random, pivot);
}

void FillPull(Random* random, v1::RowPull* pull) {
  pull->set_layer(static_cast<uint32_t>(RandomNumber(random, UINT32_MAX)));
  pull->set_kept_tokens(static_cast<uint32_t>(random->Between(0, 5000)));
  if (random->Chance(50)) pull->add_tensors(v1::TENSOR_KEYS);
  pull->add_tensors(v1::TENSOR_VALUES);
  pull->set_complete(random->Chance(50));
  AddRandomPieces(random, pull);
}

}  // namespace

grpc::ByteBuffer CutInto(const std::string& bytes, absl::Span<const size_t> lengths) {
  std::vector<grpc::Slice> slices;
  size_t begin = 0;
  for (size_t length : lengths) {
    const size_t size = std::min(length, bytes.size() - begin);
    slices.emplace_back(bytes.data() + begin, size);
    begin += size;
  }
  slices.emplace_back(bytes.data() + begin, bytes.size() - begin);
  return {slices.data(), slices.size()};
}

grpc::ByteBuffer CutEvery(const std::string& bytes, size_t step) {
  return CutInto(bytes, std::vector<size_t>(bytes.size() / step, step));
}

grpc::ByteBuffer CutRandomly(const std::string& bytes, Random* random) {
  std::vector<size_t> lengths;
  for (size_t begin = 0; begin < bytes.size(); begin += lengths.back()) {
    lengths.push_back(static_cast<size_t>(random->Between(0, random->Chance(50) ? 9 : 5000)));
  }
  return CutInto(bytes, lengths);
}

std::string Flatten(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  std::string bytes;
  if (!buffer.Dump(&slices).ok()) return bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

v1::CompressRequest ToProto(const Request& request) {
  if (const auto* message = std::get_if<v1::CompressRequest>(&request)) return *message;
  v1::CompressRequest message;
  message.set_prompt(std::get<Pieces>(request).prompt);
  message.mutable_pieces();
  for (const Piece& piece : std::get<Pieces>(request).pieces) {
    *message.mutable_pieces()->add_pieces() = ToProto(piece);
  }
  return message;
}

v1::CompressResponse ToProto(const Response& response) {
  v1::CompressResponse message = response.message;
  for (const Piece& piece : response.pieces.pieces) {
    *(message.has_layer()  ? message.mutable_layer()->add_pieces()
      : message.has_pull() ? message.mutable_pull()->add_pieces()
                           : message.mutable_pivot()->add_pieces()) = ToProto(piece);
  }
  return message;
}

v1::FetchCacheResponse ToProto(const FetchResponse& response) {
  v1::FetchCacheResponse message = response.message;
  for (const Piece& piece : response.pieces.pieces) {
    *message.mutable_layer()->add_pieces() = ToProto(piece);
  }
  return message;
}

std::string Normalized(v1::CompressRequest request) {
  request.DiscardUnknownFields();
  if (request.has_pieces()) DropEmptyData(request.mutable_pieces()->mutable_pieces());
  return request.SerializeAsString();
}

std::string Normalized(v1::CompressResponse response) {
  response.DiscardUnknownFields();
  if (response.has_layer()) DropEmptyData(response.mutable_layer()->mutable_pieces());
  if (response.has_pivot()) DropEmptyData(response.mutable_pivot()->mutable_pieces());
  if (response.has_pull()) DropEmptyData(response.mutable_pull()->mutable_pieces());
  return response.SerializeAsString();
}

std::string Normalized(v1::FetchCacheResponse response) {
  response.DiscardUnknownFields();
  if (response.has_layer()) DropEmptyData(response.mutable_layer()->mutable_pieces());
  return response.SerializeAsString();
}

bool RunsLieInSlices(const Pieces& pieces) {
  for (const Piece& piece : pieces.pieces) {
    for (const absl::Span<const std::byte> run : piece.data) {
      const auto* begin = reinterpret_cast<const uint8_t*>(run.data());
      const bool inside =
          std::any_of(pieces.slices.begin(), pieces.slices.end(), [&](const grpc::Slice& slice) {
            return begin >= slice.begin() && begin + run.size() <= slice.end();
          });
      if (!inside) return false;
    }
  }
  return true;
}

v1::TensorPiece RandomPiece(Random* random) {
  v1::TensorPiece piece;
  piece.set_layer(static_cast<uint32_t>(RandomNumber(random, UINT32_MAX)));
  piece.set_tensor(static_cast<v1::Tensor>(random->Chance(10) ? -1 : random->Between(0, 12)));
  piece.set_offset_bytes(RandomNumber(random, UINT64_MAX));
  if (random->Chance(50)) piece.set_xxh3_64(RandomNumber(random, UINT64_MAX));
  switch (random->Between(0, 5)) {
    case 0:
      break;
    case 5:
      piece.mutable_transfer()->set_key(
          RandomBytes(random, static_cast<size_t>(random->Between(0, 200))));
      piece.mutable_transfer()->set_size_bytes(RandomNumber(random, UINT64_MAX));
      break;
    case 1: {
      v1::RegionRange* range = piece.mutable_range();
      range->set_region(static_cast<uint32_t>(RandomNumber(random, UINT32_MAX)));
      range->set_offset_bytes(RandomNumber(random, UINT64_MAX));
      range->set_size_bytes(RandomNumber(random, UINT64_MAX));
      break;
    }
    case 2:  // about the size from which data get a slice of their own
      piece.set_data(RandomBytes(random, static_cast<size_t>(random->Between(4090, 4102))));
      break;
    default:
      piece.set_data(RandomBytes(random, static_cast<size_t>(random->Between(0, 200))));
  }
  return piece;
}

v1::CompressRequest RandomPieces(Random* random) {
  v1::CompressRequest request;
  request.mutable_pieces();
  AddRandomPieces(random, request.mutable_pieces());
  if (random->Chance(50))
    request.set_prompt(static_cast<uint32_t>(RandomNumber(random, UINT32_MAX)));
  return request;
}

v1::CompressResponse RandomResponse(Random* random) {
  v1::CompressResponse response;
  switch (random->Between(0, 9)) {
    case 0:
      break;
    case 1:
      FillOpened(random, response.mutable_opened());
      break;
    case 2:
      response.mutable_summary()->set_output_bytes(random->Next());
      break;
    case 3:
      FillPull(random, response.mutable_pull());
      break;
    case 4:
    case 5:
      FillPivot(random, response.mutable_pivot());
      break;
    default:
      FillLayer(random, response.mutable_layer());
  }
  if (random->Chance(50)) {
    response.set_prompt(static_cast<uint32_t>(RandomNumber(random, UINT32_MAX)));
  }
  return response;
}

v1::FetchCacheResponse RandomFetchResponse(Random* random) {
  v1::FetchCacheResponse response;
  switch (random->Between(0, 5)) {
    case 0:
      break;
    case 1:
      response.mutable_info()->add_kept_tokens(static_cast<uint32_t>(random->Next()));
      response.mutable_info()->set_total_bytes(random->Next());
      break;
    case 2:
      response.mutable_summary()->set_sent_bytes(random->Next());
      break;
    default:
      FillLayer(random, response.mutable_layer());
  }
  return response;
}

}  // namespace structkv::wire::testing
