#include "service/session/layer_assembler.h"

#include <algorithm>
#include <cstring>
#include <utility>

#define XXH_STATIC_LINKING_ONLY  // a hash state on the stack
#include <xxhash.h>
#if defined(__x86_64__)
#include <xxh_x86dispatch.h>  // the widest vectors that the machine has
#endif

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace structkv::session {
namespace {

// Copied and hashed at a time: small enough that the bytes are read from memory once.
constexpr size_t kStepBytes = size_t{8} << 10;

int64_t SizeOf(const InputPiece& piece) {
  int64_t size = 0;
  for (const absl::Span<const std::byte> run : piece.data) {
    size += static_cast<int64_t>(run.size());
  }
  return size;
}

// XXH3 of the piece's bytes, which are copied to `to` unless it is null. nullopt: stopped.
std::optional<uint64_t> CopyAndHash(const InputPiece& piece, std::byte* to,
                                    const std::atomic<bool>& stop) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  for (absl::Span<const std::byte> run : piece.data) {
    if (stop.load(std::memory_order_relaxed)) return std::nullopt;
    while (!run.empty()) {
      const size_t size = std::min(run.size(), kStepBytes);
      XXH3_64bits_update(&state, run.data(), size);
      if (to != nullptr) {
        std::memcpy(to, run.data(), size);
        to += size;
      }
      run.remove_prefix(size);
    }
  }
  return XXH3_64bits_digest(&state);
}

}  // namespace

LayerAssembler::LayerAssembler(const engine::PromptSpec* spec, engine::BufferPool* pool,
                               int64_t layers_in_flight)
    : spec_(*spec),
      pool_(pool),
      layers_in_flight_(layers_in_flight),
      layers_(static_cast<size_t>(spec->geometry.layers)) {
  int required = 0;
  for (int i = 0; i < engine::kInputTensors; ++i) {
    tensor_bytes_[i] = spec_.InputBytes(static_cast<engine::InputTensor>(i));
    if (tensor_bytes_[i] > 0) ++required;
  }
  for (int64_t layer = 0; layer < spec_.geometry.layers; ++layer) {
    if (required > 0 && spec_.has_input(layer)) {
      layers_[static_cast<size_t>(layer)].missing = required;
      continue;
    }
    // Nothing has to come (a plan of a method without statistics, a layer that the method does not
    // look at): the layer is complete as it is.
    complete_.emplace_back().layer = layer;
    ++buffers_used_;
    ++received_layers_;
  }
  SkipFinished();
}

void LayerAssembler::SkipFinished() {
  while (lowest_unfinished_ < spec_.geometry.layers &&
         layers_[static_cast<size_t>(lowest_unfinished_)].missing == 0) {
    ++lowest_unfinished_;
  }
}

std::string LayerAssembler::Name(const InputPiece& piece) const {
  const std::string_view tensor = engine::InputTensorName(piece.tensor);
  return absl::StrCat("layer ", piece.layer, ", ", absl::string_view(tensor.data(), tensor.size()));
}

absl::Status LayerAssembler::CheckWindow(const InputPiece& piece) const {
  const int64_t end = lowest_unfinished_ + layers_in_flight_;
  if (piece.layer < end) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      Name(piece), ": the piece at offset_bytes ", piece.offset_bytes, " is too early; layer ",
      lowest_unfinished_, " is unfinished and layers_in_flight is ", layers_in_flight_,
      ", so layers below ", end, " are allowed"));
}

engine::Buffer& LayerAssembler::BufferOf(engine::LayerInput& input,
                                         engine::InputTensor tensor) const {
  switch (tensor) {
    case engine::InputTensor::kKeys:
      return input.keys;
    case engine::InputTensor::kValues:
      return input.values;
    case engine::InputTensor::kWindowQueries:
      return input.window_queries;
    case engine::InputTensor::kWindowLse:
      return input.window_lse;
    case engine::InputTensor::kSaliency:
      break;
  }
  return input.saliency;
}

engine::LayerInput* LayerAssembler::Buffers(int64_t layer) {
  const auto found = partial_.find(layer);
  if (found != partial_.end()) return &found->second;
  if (buffers_used_ >= layers_in_flight_) return nullptr;
  ++buffers_used_;
  engine::LayerInput& input = partial_[layer];
  input.layer = layer;
  for (int i = 0; i < engine::kInputTensors; ++i) {
    BufferOf(input, static_cast<engine::InputTensor>(i)) =
        pool_->Acquire(static_cast<size_t>(tensor_bytes_[i]));
  }
  return &input;
}

absl::StatusOr<LayerAssembler::Taken> LayerAssembler::Take(const InputPiece& piece,
                                                           const std::atomic<bool>& stop) {
  if (piece.layer < 0 || piece.layer >= spec_.geometry.layers) {
    return absl::OutOfRangeError(absl::StrCat("a piece names layer ", piece.layer,
                                              "; the model has layers 0 to ",
                                              spec_.geometry.layers - 1));
  }
  const auto index = static_cast<size_t>(piece.tensor);
  if (!spec_.has_input(piece.layer)) {
    return absl::InvalidArgumentError(absl::StrCat(
        Name(piece), ": this prompt needs no tensor of the layer; see Opened.kept_tokens"));
  }
  if (index >= tensor_bytes_.size() || tensor_bytes_[index] == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(Name(piece), ": this prompt has no such tensor; see Opened.required_tensors"));
  }
  Layer& layer = layers_[static_cast<size_t>(piece.layer)];
  PieceMap& map = layer.tensors[index];
  const int64_t size = SizeOf(piece);
  const absl::StatusOr<std::optional<uint64_t>> known =
      map.Find(tensor_bytes_[index], piece.offset_bytes, size, Name(piece));
  if (!known.ok()) return known.status();
  std::byte* to = nullptr;
  if (!known->has_value()) {
    if (absl::Status window = CheckWindow(piece); !window.ok()) return window;
    engine::LayerInput* input = Buffers(piece.layer);
    if (input == nullptr) return Taken::kNoBuffer;
    to = BufferOf(*input, piece.tensor).data() + piece.offset_bytes;
  }
  const std::optional<uint64_t> xxh3 = CopyAndHash(piece, to, stop);
  if (!xxh3.has_value()) return Taken::kStopped;
  if (piece.xxh3_64.has_value() && *piece.xxh3_64 != *xxh3) {
    return absl::DataLossError(absl::StrFormat(
        "%s: the piece of %d bytes at offset_bytes %d has the checksum 0x%016x, its xxh3_64 says "
        "0x%016x",
        Name(piece), size, piece.offset_bytes, *xxh3, *piece.xxh3_64));
  }
  if (known->has_value()) {
    if (**known == *xxh3) return Taken::kYes;
    return absl::AlreadyExistsError(absl::StrCat(Name(piece), ": the piece of ", size,
                                                 " bytes at offset_bytes ", piece.offset_bytes,
                                                 " came before with other bytes"));
  }
  map.Add(piece.offset_bytes, size, *xxh3);
  received_bytes_ += size;
  if (map.bytes() == tensor_bytes_[index] && --layer.missing == 0) Complete(piece.layer);
  return Taken::kYes;
}

void LayerAssembler::Complete(int64_t layer) {
  const auto found = partial_.find(layer);
  complete_.push_back(std::move(found->second));
  partial_.erase(found);
  ++received_layers_;
  SkipFinished();
}

std::optional<engine::LayerInput> LayerAssembler::PopComplete() {
  if (complete_.empty()) return std::nullopt;
  engine::LayerInput input = std::move(complete_.front());
  complete_.pop_front();
  return input;
}

absl::Status LayerAssembler::CheckCommit(int64_t layers, int64_t input_bytes) {
  if (layers != spec_.geometry.layers) {
    return absl::InvalidArgumentError(absl::StrCat(
        "commit.layer_count is ", layers, "; the model has ", spec_.geometry.layers, " layers"));
  }
  if (lowest_unfinished_ < spec_.geometry.layers) {
    const Layer& layer = layers_[static_cast<size_t>(lowest_unfinished_)];
    for (size_t i = 0; i < tensor_bytes_.size(); ++i) {
      if (layer.tensors[i].bytes() == tensor_bytes_[i]) continue;
      const InputPiece missing = {.layer = lowest_unfinished_,
                                  .tensor = static_cast<engine::InputTensor>(i)};
      return absl::InvalidArgumentError(absl::StrCat(
          "commit of ", layers, " layers, but ", received_layers_, " are complete; ", Name(missing),
          " has ", layer.tensors[i].bytes(), " of ", tensor_bytes_[i], " bytes"));
    }
  }
  if (input_bytes != received_bytes_) {
    return absl::InvalidArgumentError(
        absl::StrCat("commit.input_bytes is ", input_bytes, "; ", received_bytes_, " bytes came"));
  }
  return absl::OkStatus();
}

int64_t LayerAssembler::RecordBytes(const engine::PromptSpec& spec) {
  int64_t per_layer = static_cast<int64_t>(sizeof(Layer));
  for (const engine::InputTensor tensor : spec.RequiredTensors()) {
    const int64_t bytes = spec.InputBytes(tensor);
    per_layer += std::min(bytes, PieceMap::MaxPieces(bytes)) * PieceMap::kBytesPerPiece;
  }
  return per_layer * spec.geometry.layers;
}

}  // namespace structkv::session
