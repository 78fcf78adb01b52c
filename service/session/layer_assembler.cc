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
#include "kernels/streaming_copy.h"

namespace structkv::session {
namespace {

int64_t SizeOf(const InputPiece& piece) {
  // What is too large for the type is too large for every tensor.
  if (piece.range.has_value()) return static_cast<int64_t>(piece.range->size_bytes);
  if (piece.transfer.has_value()) return static_cast<int64_t>(piece.transfer->size_bytes);
  int64_t size = 0;
  for (const absl::Span<const std::byte> run : piece.data) {
    size += static_cast<int64_t>(run.size());
  }
  return size;
}

// Taken at a time, between two looks at `stop`: small enough that bytes which are hashed and copied
// are read from memory once. Of a piece without a checksum the first kSampledBytes of each step,
// counted from the piece's begin, are hashed.
constexpr int64_t kStepBytes = int64_t{8} << 10;
constexpr int64_t kSampledBytes = 256;

// Calls step(part, offset) for each part of the piece in turn, with its offset in the piece; a part
// lies in one step. False: stopped.
template <typename Step>
bool ForEachPart(const InputPiece& piece, const std::atomic<bool>& stop, Step step) {
  int64_t offset = 0;
  for (absl::Span<const std::byte> run : piece.data) {
    while (!run.empty()) {
      if (stop.load(std::memory_order_relaxed)) return false;
      const auto size =
          std::min(static_cast<int64_t>(run.size()), kStepBytes - offset % kStepBytes);
      step(run.subspan(0, static_cast<size_t>(size)), offset);
      run.remove_prefix(static_cast<size_t>(size));
      offset += size;
    }
  }
  return true;
}

// Copies the piece's bytes to `to` unless it is null, and hashes them. False: stopped.
bool CopyAndHash(const InputPiece& piece, bool sampled, std::byte* to,
                 const std::atomic<bool>& stop, PieceDigest* digest) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  const bool all = ForEachPart(piece, stop, [&](absl::Span<const std::byte> part, int64_t offset) {
    auto hashed = static_cast<int64_t>(part.size());
    if (sampled) hashed = std::min(hashed, kSampledBytes - offset % kStepBytes);
    if (hashed > 0) XXH3_64bits_update(&state, part.data(), static_cast<size_t>(hashed));
    if (to != nullptr) StreamingCopy(to + offset, part.data(), part.size());
  });
  FinishStreamingCopies();
  *digest = {XXH3_64bits_digest(&state), sampled};
  return all;
}

// Of a tensor in place: its range or its transfer, as its bytes are not looked at.
PieceDigest DigestOfSource(const InputPiece& piece) {
  if (piece.transfer.has_value()) {
    return {XXH3_64bits(piece.transfer->key.data(), piece.transfer->key.size()),
            /*sampled=*/false};
  }
  const uint64_t place[] = {piece.range->region, piece.range->offset_bytes};
  return {XXH3_64bits(place, sizeof(place)), /*sampled=*/false};
}

// As it came: SizeOf() of what is too large is negative.
std::string SizeText(const InputPiece& piece) {
  return absl::StrCat(piece.range.has_value()      ? piece.range->size_bytes
                      : piece.transfer.has_value() ? piece.transfer->size_bytes
                                                   : static_cast<uint64_t>(SizeOf(piece)));
}

bool SameBytes(const InputPiece& piece, const std::byte* bytes) {
  for (const absl::Span<const std::byte> run : piece.data) {
    if (std::memcmp(run.data(), bytes, run.size()) != 0) return false;
    bytes += run.size();
  }
  return true;
}

}  // namespace

LayerAssembler::LayerAssembler(const engine::PromptSpec* spec, engine::BufferPool* pool,
                               int64_t layers_in_flight, const transport::Transport* transport)
    : spec_(*spec),
      pool_(pool),
      transport_(*transport),
      layers_in_flight_(layers_in_flight),
      layers_(static_cast<size_t>(spec->geometry.layers)) {
  int required = 0;
  for (int i = 0; i < engine::kInputTensors; ++i) {
    tensor_bytes_[i] = spec_.InputBytes(static_cast<engine::InputTensor>(i));
    skeleton_bytes_[i] = spec_.SkeletonInputBytes(static_cast<engine::InputTensor>(i));
    if (tensor_bytes_[i] > 0) ++required;
  }
  for (int64_t layer = 0; layer < spec_.geometry.layers; ++layer) {
    if (required > 0 && spec_.has_input(layer)) {
      layers_[static_cast<size_t>(layer)].missing = required;
      continue;
    }
    // Nothing has to come (a plan of a method without statistics, a layer that the method does not
    // look at): the layer is complete as it is.
    layers_[static_cast<size_t>(layer)].finished = true;
    complete_.emplace_back().layer = layer;
    ++buffers_used_;
    ++received_layers_;
  }
  SkipFinished();
}

void LayerAssembler::SkipFinished() {
  while (lowest_unfinished_ < spec_.geometry.layers &&
         layers_[static_cast<size_t>(lowest_unfinished_)].finished) {
    ++lowest_unfinished_;
  }
}

std::string LayerAssembler::Name(const InputPiece& piece) const {
  const std::string_view tensor = engine::InputTensorName(piece.tensor);
  return absl::StrCat("layer ", piece.layer, ", ", absl::string_view(tensor.data(), tensor.size()));
}

absl::StatusOr<engine::Buffer> LayerAssembler::ResolveSource(const InputPiece& piece,
                                                             int64_t tensor_bytes) const {
  const bool transferred = InPlace(piece.tensor) && transport_.transfers() != nullptr;
  absl::StatusOr<engine::Buffer> buffer = engine::Buffer();
  if (piece.transfer.has_value() && !transferred) {
    buffer = absl::InvalidArgumentError(
        "the piece has a `transfer`; keys and values of the transport nccl alone have one");
  } else if (!InPlace(piece.tensor)) {
    buffer = transport_.Resolve(*piece.range);
  } else if (transferred && !piece.transfer.has_value()) {
    buffer = absl::InvalidArgumentError(
        "the piece has no `transfer`, by which keys and values of the transport nccl come");
  } else if (!transferred && !piece.range.has_value()) {
    buffer = absl::InvalidArgumentError(
        "the piece has `data`; the transport reads keys and values in place, from a `range`");
  } else if (piece.xxh3_64.has_value() && !transport_.host_readable()) {
    buffer = absl::InvalidArgumentError(
        "the piece has a checksum, and its tensor lies in a GPU's memory, where it is not "
        "verified");
  } else if (piece.offset_bytes != 0 || SizeOf(piece) != tensor_bytes) {
    buffer = absl::InvalidArgumentError(
        absl::StrCat(transferred ? "transfer" : "range", ".size_bytes is ", SizeText(piece),
                     " at the tensor's offset_bytes ", piece.offset_bytes, "; one ",
                     transferred ? "transfer" : "range", " of the whole tensor, ", tensor_bytes,
                     " bytes, is allowed"));
  } else if (transferred) {
    const size_t key_bytes = piece.transfer->key.size();
    if (key_bytes == 0 || key_bytes > transport::kMaxTransferKeyBytes) {
      buffer =
          absl::InvalidArgumentError(absl::StrCat("transfer.key has ", key_bytes, " bytes; 1 to ",
                                                  transport::kMaxTransferKeyBytes, " are allowed"));
    }
  } else {
    buffer = transport_.ResolveInPlace(*piece.range);
  }
  if (buffer.ok()) return buffer;
  return absl::Status(buffer.status().code(),
                      absl::StrCat(Name(piece), ": ", buffer.status().message()));
}

absl::Status LayerAssembler::JoinTransfer(const InputPiece& piece, engine::LayerInput& input) {
  const auto [joined, first] = transfer_keys_.emplace(piece.layer, piece.transfer->key);
  if (!first && joined->second != piece.transfer->key) {
    return absl::InvalidArgumentError(
        absl::StrCat(Name(piece),
                     ": transfer.key is another than that of the layer's other tensor; keys and "
                     "values of a layer come by one transfer"));
  }
  BufferOf(input, piece.tensor).Truncate(static_cast<size_t>(piece.transfer->size_bytes));
  return absl::OkStatus();
}

absl::Status LayerAssembler::CheckWindow(const InputPiece& piece) const {
  const int64_t end = lowest_unfinished_ + layers_in_flight_;
  if (piece.layer < end) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      Name(piece), ": the piece at offset_bytes ", piece.offset_bytes, " is too early; layer ",
      lowest_unfinished_, " is unfinished and layers_in_flight is ", layers_in_flight_,
      ", so layers below ", end, " are allowed"));
}

// Positions come first, and are allowed to: then the sizes of all that follows are known.
absl::Status LayerAssembler::CheckSkeletonOrder(const InputPiece& piece, const Layer& layer) const {
  constexpr auto kPositions = static_cast<size_t>(engine::InputTensor::kPositions);
  if (piece.tensor != engine::InputTensor::kPositions) {
    const int64_t came = layer.tensors[kPositions].bytes();
    if (!layer.skeleton || came == skeleton_bytes_[kPositions]) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(Name(piece), ": the piece came before all of the layer's positions, of which ",
                     came, " of ", skeleton_bytes_[kPositions], " bytes came"));
  }
  if (layer.skeleton) return absl::OkStatus();
  absl::string_view fault;
  if (!spec_.may_have_skeleton_layers()) {
    fault = spec_.method.has_centrality()
                ? "the pivot is decided after the last layer, so full layers alone are allowed"
                : "the method has no skeleton rows, so full layers alone are allowed";
  } else if (skeleton_ == nullptr) {
    fault = "the pivot is not decided yet; full layers alone are allowed until then";
  } else if (!skeleton_->from_layer.has_value()) {
    fault = "no layer follows the pivot; full layers alone are allowed";
  } else if (piece.layer < *skeleton_->from_layer) {
    return absl::InvalidArgumentError(absl::StrCat(
        Name(piece), ": skeleton rows are allowed from layer ", *skeleton_->from_layer, " on"));
  } else {
    for (const PieceMap& map : layer.tensors) {
      if (map.bytes() > 0) {
        fault = "they came after other pieces of the layer; they must be complete before any other";
      }
    }
  }
  if (fault.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(Name(piece), ": ", fault));
}

absl::Status LayerAssembler::CheckPositionValues(const InputPiece& piece) const {
  const std::vector<int32_t>& skeleton = skeleton_->positions;
  const auto* expected = reinterpret_cast<const std::byte*>(skeleton.data()) + piece.offset_bytes;
  int64_t offset = piece.offset_bytes;
  for (const absl::Span<const std::byte> run : piece.data) {
    const auto differs = std::mismatch(run.begin(), run.end(), expected);
    if (differs.first != run.end()) {
      offset += differs.first - run.begin();
      const int64_t entry = offset / static_cast<int64_t>(sizeof(int32_t));
      return absl::InvalidArgumentError(
          absl::StrCat(Name(piece), ": entry ", entry, " differs from the skeleton's, ",
                       skeleton[static_cast<size_t>(entry)], "; exactly the skeleton of ",
                       skeleton.size(), " tokens is allowed"));
    }
    expected += run.size();
    offset += static_cast<int64_t>(run.size());
  }
  return absl::OkStatus();
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
    case engine::InputTensor::kKeyScales:
      return input.key_scales;
    case engine::InputTensor::kValueScales:
      return input.value_scales;
    case engine::InputTensor::kSaliency:
    case engine::InputTensor::kPositions:  // has no buffer
      break;
  }
  return input.saliency;
}

engine::LayerInput* LayerAssembler::Buffers(int64_t layer, bool skeleton_rows) {
  const auto found = partial_.find(layer);
  if (found != partial_.end()) return &found->second;
  if (buffers_used_ >= layers_in_flight_) return nullptr;
  ++buffers_used_;
  engine::LayerInput& input = partial_[layer];
  input.layer = layer;
  transport_.GiveRoom(&input);
  if (skeleton_rows) input.positions = skeleton_->positions;
  for (int i = 0; i < engine::kInputTensors; ++i) {
    const auto tensor = static_cast<engine::InputTensor>(i);
    if (tensor == engine::InputTensor::kPositions || InPlace(tensor)) continue;
    BufferOf(input, tensor) = pool_->AcquirePinned(
        static_cast<size_t>((skeleton_rows ? skeleton_bytes_ : tensor_bytes_)[i]));
  }
  return &input;
}

std::optional<bool> LayerAssembler::IsKnownAgain(const InputPiece& piece, const PieceDigest& known,
                                                 PieceDigest digest,
                                                 const std::atomic<bool>& stop) {
  if (InPlace(piece.tensor)) return digest == known;
  if (piece.tensor == engine::InputTensor::kPositions) {
    const auto* skeleton = reinterpret_cast<const std::byte*>(skeleton_->positions.data());
    return SameBytes(piece, skeleton + piece.offset_bytes);
  }
  const bool expects_rows = layers_[static_cast<size_t>(piece.layer)].rows.has_value();
  const auto held = partial_.find(piece.layer);
  if (held != partial_.end() && spec_.pulls(piece.tensor) == expects_rows) {
    return SameBytes(piece, BufferOf(held->second, piece.tensor).data() + piece.offset_bytes);
  }
  if (digest.sampled != known.sampled &&
      !CopyAndHash(piece, known.sampled, nullptr, stop, &digest)) {
    return std::nullopt;
  }
  return digest == known;
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
  const bool positions = piece.tensor == engine::InputTensor::kPositions;
  const bool pulled = spec_.pulls(piece.tensor);
  if (index >= tensor_bytes_.size() || (tensor_bytes_[index] == 0 && !positions && !pulled)) {
    return absl::InvalidArgumentError(
        absl::StrCat(Name(piece), ": this prompt has no such tensor; see Opened.required_tensors"));
  }
  Layer& layer = layers_[static_cast<size_t>(piece.layer)];
  if (pulled && !layer.rows.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        Name(piece), ": the piece came before the layer's pull, which names the rows to send"));
  }
  if (absl::Status order = CheckSkeletonOrder(piece, layer); !order.ok()) return order;
  const int64_t tensor_bytes = positions ? skeleton_bytes_[index] : TensorBytes(layer, index);
  if (!InPlace(piece.tensor) && !piece.range.has_value() && !piece.transfer.has_value()) {
    return Place(piece, tensor_bytes, {}, stop);
  }
  absl::StatusOr<engine::Buffer> bytes = ResolveSource(piece, tensor_bytes);
  if (!bytes.ok()) return bytes.status();
  InputPiece found = piece;
  found.data = {bytes->span()};
  absl::StatusOr<Taken> taken = Place(found, tensor_bytes, *std::move(bytes), stop);
  if (absl::Status whole = transport_.Check(); !whole.ok()) return whole;
  return taken;
}

absl::StatusOr<LayerAssembler::Taken> LayerAssembler::Place(const InputPiece& piece,
                                                            int64_t tensor_bytes,
                                                            engine::Buffer lent,
                                                            const std::atomic<bool>& stop) {
  const bool positions = piece.tensor == engine::InputTensor::kPositions;
  const bool in_place = InPlace(piece.tensor);
  Layer& layer = layers_[static_cast<size_t>(piece.layer)];
  PieceMap& map = layer.tensors[static_cast<size_t>(piece.tensor)];
  const int64_t size = SizeOf(piece);
  const absl::StatusOr<std::optional<PieceDigest>> known =
      map.Find(tensor_bytes, piece.offset_bytes, size, Name(piece));
  if (!known.ok()) return known.status();
  std::byte* to = nullptr;
  engine::LayerInput* input = nullptr;
  if (!known->has_value()) {
    if (absl::Status window = CheckWindow(piece); !window.ok()) return window;
    input = Buffers(piece.layer, positions || layer.skeleton);
    if (input == nullptr) return Taken::kNoBuffer;
    if (!positions && !in_place) {
      to = BufferOf(*input, piece.tensor).data() + piece.offset_bytes;
    }
  }
  PieceDigest digest;
  // What came before is told by its range, however long it is.
  const bool looked_at = !in_place || (piece.xxh3_64.has_value() && !known->has_value());
  if (looked_at && !CopyAndHash(piece, !piece.xxh3_64.has_value(), to, stop, &digest)) {
    return Taken::kStopped;
  }
  if (looked_at && piece.xxh3_64.has_value() && *piece.xxh3_64 != digest.xxh3) {
    return absl::DataLossError(absl::StrFormat(
        "%s: the piece of %d bytes at offset_bytes %d has the checksum 0x%016x, its xxh3_64 says "
        "0x%016x",
        Name(piece), size, piece.offset_bytes, digest.xxh3, *piece.xxh3_64));
  }
  if (in_place) digest = DigestOfSource(piece);
  if (known->has_value()) {
    const std::optional<bool> same = IsKnownAgain(piece, **known, digest, stop);
    if (!same.has_value()) return Taken::kStopped;
    if (*same) return Taken::kYes;
    return absl::AlreadyExistsError(absl::StrCat(Name(piece), ": the piece of ", size,
                                                 " bytes at offset_bytes ", piece.offset_bytes,
                                                 " came before with other bytes"));
  }
  if (piece.transfer.has_value()) {
    if (absl::Status joined = JoinTransfer(piece, *input); !joined.ok()) return joined;
  } else if (in_place) {
    BufferOf(*input, piece.tensor) = std::move(lent);
  }
  if (positions) {
    if (absl::Status values = CheckPositionValues(piece); !values.ok()) return values;
    if (!layer.skeleton) ++layer.missing;
    layer.skeleton = true;
  }
  map.Add(piece.offset_bytes, size, digest);
  received_bytes_ += size;
  if (map.bytes() == tensor_bytes && --layer.missing == 0) Complete(piece.layer);
  return Taken::kYes;
}

void LayerAssembler::Complete(int64_t layer) {
  Layer& record = layers_[static_cast<size_t>(layer)];
  engine::LayerInput input = std::move(partial_.extract(layer).mapped());
  if (auto key = transfer_keys_.extract(layer); !key.empty()) {
    const auto incoming = incoming_.emplace(layer, std::move(input)).first;
    told_.push_back({std::move(key.mapped()), &incoming->second});
  } else {
    (record.rows.has_value() ? complete_rows_ : complete_).push_back(std::move(input));
  }
  if (spec_.pull != engine::Pull::kNone && !record.rows.has_value()) return;
  record.finished = true;
  ++received_layers_;
  SkipFinished();
}

std::optional<LayerAssembler::Incoming> LayerAssembler::PopIncoming() {
  if (told_.empty()) return std::nullopt;
  Incoming next = std::move(told_.front());
  told_.pop_front();
  return next;
}

void LayerAssembler::Arrived(int64_t layer) {
  complete_.push_back(std::move(incoming_.extract(layer).mapped()));
}

std::optional<engine::LayerInput> LayerAssembler::PopComplete() {
  if (complete_.empty()) return std::nullopt;
  engine::LayerInput input = std::move(complete_.front());
  complete_.pop_front();
  return input;
}

void LayerAssembler::ExpectRows(int64_t layer, int64_t kept) {
  Layer& record = layers_[static_cast<size_t>(layer)];
  record.rows = kept;
  engine::LayerInput& input = partial_[layer];
  input.layer = layer;
  transport_.GiveRoom(&input);
  for (const auto tensor : {engine::InputTensor::kKeys, engine::InputTensor::kValues}) {
    const int64_t bytes = spec_.PulledBytes(tensor, kept);
    if (bytes == 0) continue;
    ++record.missing;
    if (InPlace(tensor)) continue;
    BufferOf(input, tensor) = pool_->Acquire(static_cast<size_t>(bytes));
  }
}

std::optional<engine::LayerInput> LayerAssembler::PopRows() {
  if (complete_rows_.empty()) return std::nullopt;
  engine::LayerInput rows = std::move(complete_rows_.front());
  complete_rows_.pop_front();
  return rows;
}

absl::Status LayerAssembler::CheckCommit(int64_t layers, int64_t input_bytes) {
  if (layers != spec_.geometry.layers) {
    return absl::InvalidArgumentError(absl::StrCat(
        "commit.layer_count is ", layers, "; the model has ", spec_.geometry.layers, " layers"));
  }
  if (lowest_unfinished_ < spec_.geometry.layers) {
    const Layer& layer = layers_[static_cast<size_t>(lowest_unfinished_)];
    for (size_t i = 0; i < tensor_bytes_.size(); ++i) {
      const int64_t bytes = TensorBytes(layer, i);
      if (layer.tensors[i].bytes() == bytes) continue;
      const InputPiece missing = {.layer = lowest_unfinished_,
                                  .tensor = static_cast<engine::InputTensor>(i)};
      return absl::InvalidArgumentError(
          absl::StrCat("commit of ", layers, " layers, but ", received_layers_, " are complete; ",
                       Name(missing), " has ", layer.tensors[i].bytes(), " of ", bytes, " bytes"));
    }
    return absl::InvalidArgumentError(
        absl::StrCat("commit of ", layers, " layers, but ", received_layers_,
                     " are complete; the rows of layer ", lowest_unfinished_,
                     " are still to be pulled, so the commit is too early"));
  }
  if (input_bytes != received_bytes_) {
    return absl::InvalidArgumentError(
        absl::StrCat("commit.input_bytes is ", input_bytes, "; ", received_bytes_, " bytes came"));
  }
  return absl::OkStatus();
}

int64_t LayerAssembler::RecordBytes(const engine::PromptSpec& spec) {
  int64_t per_layer = static_cast<int64_t>(sizeof(Layer));
  const auto add = [&per_layer](int64_t bytes) {
    per_layer += std::min(bytes, PieceMap::MaxPieces(bytes)) * PieceMap::kBytesPerPiece;
  };
  for (const engine::InputTensor tensor : spec.RequiredTensors()) add(spec.InputBytes(tensor));
  const int64_t most = spec.largest_kept_tokens();
  for (const auto tensor : {engine::InputTensor::kKeys, engine::InputTensor::kValues}) {
    if (spec.pulls(tensor)) add(spec.PulledBytes(tensor, most));
  }
  if (spec.may_have_skeleton_layers()) {
    add(spec.SkeletonInputBytes(engine::InputTensor::kPositions));
  }
  return per_layer * spec.geometry.layers;
}

}  // namespace structkv::session
