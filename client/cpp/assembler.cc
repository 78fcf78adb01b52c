#include "client/cpp/assembler.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/result_places.h"
#include "structkv/sizes.h"

namespace structkv::client::internal {
namespace {

constexpr size_t kHandleBytes = 16;

template <typename... Args>
absl::Status Broken(const Args&... args) {
  return absl::DataLossError(absl::StrCat("the server broke the protocol: ", args...));
}

template <typename... Args>
absl::Status Disagrees(const char* field, const Args&... args) {
  return absl::DataLossError(
      absl::StrCat("the server's summary disagrees: Summary.", field, " is ", args...));
}

bool PullsRows(const v1::Open& open) {
  return open.pull() == v1::PULL_VALUES || open.pull() == v1::PULL_KEYS_AND_VALUES;
}

bool HasSkeleton(const v1::Method& method) {
  return method.has_structkv() || method.has_fastkv() || method.has_gemfilter();
}

// With the default that the proto gives.
v1::Method::KindCase KindOf(const v1::Method& method) {
  return method.kind_case() == v1::Method::KIND_NOT_SET ? v1::Method::kStructkv
                                                        : method.kind_case();
}

template <typename T>
std::vector<T> Values(const Bytes& bytes) {
  const absl::Span<const T> values = bytes.as<T>();
  return {values.begin(), values.end()};
}

}  // namespace

Assembler::Assembler(v1::Open open, ResultAllocator allocate, BytesPool* pool,
                     std::function<bool(uint32_t)> sent_skeleton, Bytes results)
    : open_(std::move(open)),
      allocate_(std::move(allocate)),
      pool_(pool),
      sent_skeleton_(std::move(sent_skeleton)),
      results_(std::move(results)) {}

absl::StatusOr<std::optional<Event>> Assembler::Add(wire::Response response) {
  v1::CompressResponse& message = response.message;
  if (summary_.has_value()) return Broken("a message came after the summary");
  if (!opened_.has_value() && message.message_case() != v1::CompressResponse::kOpened) {
    return Broken("the first message is not `opened`");
  }
  if (layer_.has_value() && message.message_case() != v1::CompressResponse::kLayer) {
    return Broken("layer ", layer_->result.layer, " was interrupted");
  }
  if (pivot_.has_value() && message.message_case() != v1::CompressResponse::kPivot) {
    return Broken("the pivot was interrupted");
  }
  if (pull_.has_value() && message.message_case() != v1::CompressResponse::kPull) {
    return Broken("the pull of layer ", pull_->result.layer, " was interrupted");
  }
  switch (message.message_case()) {
    case v1::CompressResponse::kOpened: {
      absl::Status status = AddOpened(std::move(*message.mutable_opened()));
      if (!status.ok()) return status;
      return std::nullopt;
    }
    case v1::CompressResponse::kLayer:
      return AddLayer(message.layer(), response.pieces);
    case v1::CompressResponse::kPivot:
      return AddPivot(message.pivot(), response.pieces);
    case v1::CompressResponse::kPull: {
      absl::Status status = AddPull(message.pull(), response.pieces);
      if (!status.ok()) return status;
      return std::nullopt;
    }
    case v1::CompressResponse::kSummary:
      summary_ = std::move(*message.mutable_summary());
      return std::nullopt;
    default:
      // A later version's message; nothing that this client asked for depends on it.
      return std::nullopt;
  }
}

absl::Status Assembler::AddOpened(v1::Opened opened) {
  if (opened_.has_value()) return Broken("`opened` came twice");
  const uint32_t layers = open_.geometry().layer_count();
  if (static_cast<uint32_t>(opened.kept_tokens_size()) != layers) {
    return Broken("Opened.kept_tokens has ", opened.kept_tokens_size(), " entries for ", layers,
                  " layers");
  }
  // Which tensors come depends on it.
  if (opened.method().kind_case() != KindOf(open_.method())) {
    return Broken("Opened.method is another than that of Open");
  }
  for (uint32_t kept : opened.kept_tokens()) {
    if (kept > open_.prompt_tokens()) {
      return Broken("Opened.kept_tokens is ", kept, " of ", open_.prompt_tokens(), " tokens");
    }
  }
  if (opened.skeleton_tokens() > open_.prompt_tokens()) {
    return Broken("Opened.skeleton_tokens is ", opened.skeleton_tokens(), " of ",
                  open_.prompt_tokens(), " tokens");
  }
  for (const int tensor : opened.required_tensors()) {
    if (tensor == v1::TENSOR_VALUES && PullsRows(open_)) {
      return absl::UnimplementedError("the server does not know Open.pull: it wants all values");
    }
  }
  const auto& asked = open_.transports();
  if (opened.transport() > v1::TRANSPORT_INLINE &&
      std::find(asked.begin(), asked.end(), opened.transport()) == asked.end()) {
    return Broken("Opened.transport is ", v1::Transport_Name(opened.transport()),
                  ", which Open did not name");
  }
  if (!results_.empty() && opened.transport() > v1::TRANSPORT_INLINE &&
      ResultBytes(open_, opened, layers) > results_.size()) {
    return Broken("Opened.kept_tokens need ", ResultBytes(open_, opened, layers),
                  " bytes of Open.result_range, which has ", results_.size());
  }
  opened_ = std::move(opened);
  return absl::OkStatus();
}

bool Assembler::PlacesResults() const {
  return !results_.empty() && opened_->transport() > v1::TRANSPORT_INLINE;
}

absl::Status Assembler::Expect(uint32_t layer, v1::Tensor tensor, uint32_t tokens, uint32_t kept,
                               Growing* growing) {
  growing->expected = AnswerTensorBytes(open_, *opened_, tensor, tokens, kept);
  if (growing->expected == 0) return absl::OkStatus();
  if (PlacesResults() && (tensor == v1::TENSOR_KEYS || tensor == v1::TENSOR_VALUES)) {
    const uint64_t at = ResultOffset(open_, *opened_, layer, tensor);
    if (InRegions(opened_->transport())) {
      growing->range = {open_.result_range().region(), open_.result_range().offset_bytes() + at,
                        growing->expected};
    } else {
      growing->transferred = true;
    }
    growing->bytes = {results_.data() + at, growing->expected, results_.owner()};
    return absl::OkStatus();
  }
  absl::StatusOr<Bytes> bytes =
      allocate_ ? allocate_(layer, tensor, growing->expected) : pool_->Acquire(growing->expected);
  if (!bytes.ok()) return bytes.status();
  growing->bytes = *std::move(bytes);
  return absl::OkStatus();
}

absl::Status Assembler::AppendRange(const wire::Piece& piece, Growing* tensor, const char* name) {
  const auto text = [](const wire::Range& range) {
    return absl::StrCat(range.size_bytes, " bytes at ", range.offset_bytes, " of region ",
                        range.region);
  };
  if (!piece.range.has_value() || !tensor->range.has_value()) {
    return Broken(name, " came ", piece.range.has_value() ? "as a range" : "in a message", ", and ",
                  tensor->range.has_value() ? "Open.result_range is theirs" : "have no range");
  }
  if (piece.offset_bytes != 0 || tensor->received > 0 ||
      text(*piece.range) != text(*tensor->range)) {
    return Broken(name, " lie in ", text(*piece.range), "; ", text(*tensor->range), " are theirs");
  }
  tensor->received = tensor->expected;
  received_bytes_ += tensor->expected;
  return absl::OkStatus();
}

absl::Status Assembler::AppendTransfer(const wire::Piece& piece, Growing* tensor,
                                       const char* name) {
  if (!piece.transfer.has_value() || !tensor->transferred) {
    return Broken(name, " came ", piece.transfer.has_value() ? "as a transfer" : "in a message",
                  ", and ", tensor->transferred ? "a transfer brings them" : "none brings them");
  }
  const wire::Transfer& transfer = *piece.transfer;
  if (piece.offset_bytes != 0 || tensor->received > 0 || transfer.size_bytes != tensor->expected) {
    return Broken(name, ": a transfer of ", transfer.size_bytes, " bytes at ", piece.offset_bytes,
                  " came where ", tensor->received, " of ", tensor->expected,
                  " bytes were received");
  }
  if (transfer.key.empty() ||
      (!layer_->transfer_key.empty() && layer_->transfer_key != transfer.key)) {
    return Broken(name, " come by another transfer than the layer's other rows");
  }
  layer_->transfer_key = transfer.key;
  tensor->received = tensor->expected;
  received_bytes_ += tensor->expected;
  return absl::OkStatus();
}

absl::Status Assembler::Append(const wire::Piece& piece, Growing* tensor, const char* name) {
  if (piece.transfer.has_value() || tensor->transferred) return AppendTransfer(piece, tensor, name);
  if (piece.range.has_value() || tensor->range.has_value()) return AppendRange(piece, tensor, name);
  const uint64_t size = piece.size_bytes();
  if (piece.offset_bytes != tensor->received || size > tensor->expected - tensor->received) {
    return Broken(name, ": a piece at ", piece.offset_bytes, " of ", size, " bytes came where ",
                  tensor->received, " of ", tensor->expected, " bytes were received");
  }
  if (tensor->bytes.size() < tensor->expected) {
    return absl::ResourceExhaustedError(absl::StrCat("PromptOptions.allocate gave ",
                                                     tensor->bytes.size(), " bytes for ", name,
                                                     "; ", tensor->expected, " are needed"));
  }
  if (piece.xxh3_64.has_value() && *piece.xxh3_64 != wire::Checksum(piece.data)) {
    return absl::DataLossError(absl::StrCat(name, ": checksum mismatch at ", piece.offset_bytes));
  }
  std::byte* out = tensor->bytes.data() + tensor->received;
  for (absl::Span<const std::byte> run : piece.data) {
    if (run.empty()) continue;
    std::memcpy(out, run.data(), run.size());
    out += run.size();
  }
  tensor->received += size;
  received_bytes_ += size;
  return absl::OkStatus();
}

Assembler::MaybeEvent Assembler::AddLayer(const v1::LayerResult& message,
                                          const wire::Pieces& pieces) {
  const uint32_t layer = message.layer();
  if (layer >= open_.geometry().layer_count()) {
    return Broken("LayerResult.layer is ", layer, " of ", open_.geometry().layer_count());
  }
  if (!layer_.has_value()) {
    if (!answered_.insert(layer).second) return Broken("layer ", layer, " was answered twice");
    if (PullsRows(open_) && !pulled_positions_.contains(layer)) {
      return Broken("layer ", layer, " was answered before its rows were asked for");
    }
    PendingLayer& pending = layer_.emplace();
    pending.result.layer = layer;
    pending.result.kept_tokens = message.kept_tokens();
    if (message.has_metrics()) pending.result.metrics = message.metrics();
    const uint32_t tokens = TokensOf(layer);
    const uint32_t kept = KeptOf(layer);
    if (message.kept_tokens() != kept) {
      return Broken("layer ", layer, " keeps ", message.kept_tokens(), " tokens, Opened said ",
                    kept);
    }
    pending.result.kept_blocks = KeptBlocks(open_, kept);
    if (message.kept_blocks() != pending.result.kept_blocks) {
      return Broken("layer ", layer, " comes in ", message.kept_blocks(), " blocks, ", kept,
                    " tokens fill ", pending.result.kept_blocks);
    }
    for (const auto& [tensor, growing] :
         {std::pair(v1::TENSOR_POSITIONS, &pending.positions),
          std::pair(v1::TENSOR_KEYS, &pending.keys), std::pair(v1::TENSOR_VALUES, &pending.values),
          std::pair(v1::TENSOR_KEY_SCALES, &pending.key_scales),
          std::pair(v1::TENSOR_VALUE_SCALES, &pending.value_scales),
          std::pair(v1::TENSOR_SALIENCY, &pending.saliency)}) {
      const absl::Status status = Expect(layer, tensor, tokens, kept, growing);
      if (!status.ok()) return status;
    }
  } else if (layer_->result.layer != layer) {
    return Broken("layer ", layer_->result.layer, " was interrupted by layer ", layer);
  }
  for (const wire::Piece& piece : pieces.pieces) {
    if (piece.layer != layer) {
      return Broken("a piece of layer ", piece.layer, " came with layer ", layer);
    }
    absl::Status status;
    switch (piece.tensor) {
      case v1::TENSOR_POSITIONS:
        status = Append(piece, &layer_->positions, "positions");
        break;
      case v1::TENSOR_KEYS:
        status = Append(piece, &layer_->keys, "keys");
        break;
      case v1::TENSOR_VALUES:
        status = Append(piece, &layer_->values, "values");
        break;
      case v1::TENSOR_KEY_SCALES:
        status = Append(piece, &layer_->key_scales, "key_scales");
        break;
      case v1::TENSOR_VALUE_SCALES:
        status = Append(piece, &layer_->value_scales, "value_scales");
        break;
      case v1::TENSOR_SALIENCY:
        status = Append(piece, &layer_->saliency, "saliency");
        break;
      default:
        status = Broken("a layer's result holds tensor ", piece.tensor);
    }
    if (!status.ok()) return status;
  }
  if (!message.complete()) return std::nullopt;
  absl::StatusOr<LayerResult> result = TakeLayer();
  if (!result.ok()) return result.status();
  return *std::move(result);
}

absl::StatusOr<LayerResult> Assembler::TakeLayer() {
  const struct {
    const char* name;
    Growing* tensor;
    Bytes* out;
  } tensors[] = {
      {"positions", &layer_->positions, &layer_->result.positions},
      {"keys", &layer_->keys, &layer_->result.keys},
      {"values", &layer_->values, &layer_->result.values},
      {"key_scales", &layer_->key_scales, &layer_->result.key_scales},
      {"value_scales", &layer_->value_scales, &layer_->result.value_scales},
      {"saliency", &layer_->saliency, &layer_->result.saliency},
  };
  for (const auto& [name, tensor, out] : tensors) {
    if (tensor->received != tensor->expected) {
      return Broken("layer ", layer_->result.layer, " ended with ", tensor->received, " of ",
                    tensor->expected, " bytes of ", name);
    }
    *out = std::move(tensor->bytes);
  }
  const uint32_t layer = layer_->result.layer;
  absl::Status positions = CheckPositions(layer_->result.position_values(), layer);
  if (!positions.ok()) return positions;
  if (const auto pulled = pulled_positions_.find(layer); pulled != pulled_positions_.end()) {
    if (pulled->second.as<int32_t>() != layer_->result.position_values()) {
      return Broken("layer ", layer, " keeps other positions than those that were pulled");
    }
    pulled_positions_.erase(pulled);
  }
  LayerResult result = std::move(layer_->result);
  transfer_key_ = std::move(layer_->transfer_key);
  layer_.reset();
  return result;
}

uint32_t Assembler::TokensOf(uint32_t layer) const {
  const bool skeleton = sent_skeleton_ && sent_skeleton_(layer);
  return skeleton ? opened_->skeleton_tokens() : open_.prompt_tokens();
}

uint32_t Assembler::KeptOf(uint32_t layer) const {
  return std::min(opened_->kept_tokens(static_cast<int>(layer)), TokensOf(layer));
}

absl::Status Assembler::CheckPositions(absl::Span<const int32_t> positions, uint32_t layer) const {
  for (const int32_t position : positions) {
    if (position < 0 || static_cast<uint32_t>(position) >= open_.prompt_tokens()) {
      return Broken("layer ", layer, " keeps position ", position, " of ", open_.prompt_tokens(),
                    " tokens");
    }
  }
  return absl::OkStatus();
}

absl::Status Assembler::StartPull(const v1::RowPull& message) {
  const uint32_t layer = message.layer();
  if (!PullsRows(open_))
    return Broken("rows of layer ", layer, " were asked for without Open.pull");
  if (layer >= open_.geometry().layer_count()) {
    return Broken("RowPull.layer is ", layer, " of ", open_.geometry().layer_count());
  }
  if (answered_.contains(layer) || pulled_positions_.contains(layer)) {
    return Broken("rows of layer ", layer, " were asked for twice");
  }
  const uint32_t kept = KeptOf(layer);
  if (message.kept_tokens() != kept) {
    return Broken("the pull of layer ", layer, " is of ", message.kept_tokens(),
                  " rows, Opened said ", kept);
  }
  const bool keys = open_.pull() == v1::PULL_KEYS_AND_VALUES;
  for (const int tensor : message.tensors()) {
    if (tensor != v1::TENSOR_VALUES && (tensor != v1::TENSOR_KEYS || !keys)) {
      return Broken("the pull of layer ", layer, " asks for tensor ", tensor);
    }
  }
  if (message.tensors_size() != (keys ? 2 : 1)) {
    return Broken("the pull of layer ", layer, " asks for ", message.tensors_size(), " tensors");
  }
  PendingPull& pending = pull_.emplace();
  pending.result.layer = layer;
  pending.result.kept_tokens = kept;
  pending.result.keys = keys;
  pending.positions.expected =
      AnswerTensorBytes(open_, *opened_, v1::TENSOR_POSITIONS, TokensOf(layer), kept);
  pending.positions.bytes = pool_->Acquire(pending.positions.expected);
  return absl::OkStatus();
}

absl::Status Assembler::AddPull(const v1::RowPull& message, const wire::Pieces& pieces) {
  if (!pull_.has_value()) {
    absl::Status started = StartPull(message);
    if (!started.ok()) return started;
  } else if (pull_->result.layer != message.layer()) {
    return Broken("the pull of layer ", pull_->result.layer, " was interrupted");
  }
  for (const wire::Piece& piece : pieces.pieces) {
    if (piece.layer != message.layer() || piece.tensor != v1::TENSOR_POSITIONS) {
      return Broken("the pull of layer ", message.layer(), " holds tensor ", piece.tensor,
                    " of layer ", piece.layer);
    }
    absl::Status status = Append(piece, &pull_->positions, "pulled positions");
    if (!status.ok()) return status;
  }
  return message.complete() ? CompletePull() : absl::OkStatus();
}

absl::Status Assembler::CompletePull() {
  RowPull pull = std::move(pull_->result);
  if (pull_->positions.received != pull_->positions.expected) {
    return Broken("the pull of layer ", pull.layer, " ended with ", pull_->positions.received,
                  " of ", pull_->positions.expected, " bytes of positions");
  }
  pull.positions = std::move(pull_->positions.bytes);
  pull_.reset();
  absl::Status positions = CheckPositions(pull.position_values(), pull.layer);
  if (!positions.ok()) return positions;
  pulled_positions_[pull.layer] = pull.positions;
  pulled_ = std::move(pull);
  return absl::OkStatus();
}

Assembler::MaybeEvent Assembler::AddPivot(const v1::PivotDecision& message,
                                          const wire::Pieces& pieces) {
  if (pivot_done_) return Broken("the pivot came twice");
  if (!pivot_.has_value()) {
    if (message.pivot_layer() >= open_.geometry().layer_count()) {
      return Broken("PivotDecision.pivot_layer is ", message.pivot_layer(), " of ",
                    open_.geometry().layer_count());
    }
    PendingPivot& pending = pivot_.emplace();
    pending.result.pivot_layer = message.pivot_layer();
    if (message.has_transition_layer())
      pending.result.transition_layer = message.transition_layer();
    pending.result.mode = message.mode();
    pending.result.decided_at_layer = message.decided_at_layer();
    if (message.has_skeleton_from_layer()) {
      pending.result.skeleton_from_layer = message.skeleton_from_layer();
    }
    pending.result.profiled_prompts = message.profiled_prompts();
    pending.result.layers.assign(message.layers().begin(), message.layers().end());
    pending.skeleton.expected = sizeof(int32_t) * uint64_t{opened_->skeleton_tokens()};
    pending.skeleton.bytes = pool_->Acquire(pending.skeleton.expected);
    if (open_.return_centrality() && opened_->method().has_structkv()) {
      pending.centrality.expected = sizeof(float) * uint64_t{open_.prompt_tokens()};
      pending.centrality.bytes = pool_->Acquire(pending.centrality.expected);
    }
  }
  for (const wire::Piece& piece : pieces.pieces) {
    absl::Status status;
    if (piece.tensor == v1::TENSOR_SKELETON_POSITIONS) {
      status = Append(piece, &pivot_->skeleton, "skeleton positions");
    } else if (piece.tensor == v1::TENSOR_CENTRALITY) {
      status = Append(piece, &pivot_->centrality, "centrality");
    } else {
      status = Broken("a pivot decision holds tensor ", piece.tensor);
    }
    if (!status.ok()) return status;
  }
  if (!message.complete()) return std::nullopt;
  absl::StatusOr<PivotResult> result = TakePivot();
  if (!result.ok()) return result.status();
  return *std::move(result);
}

absl::StatusOr<PivotResult> Assembler::TakePivot() {
  const struct {
    const char* name;
    const Growing* tensor;
  } tensors[] = {{"skeleton positions", &pivot_->skeleton}, {"centrality", &pivot_->centrality}};
  for (const auto& [name, tensor] : tensors) {
    if (tensor->received != tensor->expected) {
      return Broken("the pivot ended with ", tensor->received, " of ", tensor->expected,
                    " bytes of ", name);
    }
  }
  PivotResult result = std::move(pivot_->result);
  result.skeleton = Values<int32_t>(pivot_->skeleton.bytes);
  for (int32_t position : result.skeleton) {
    if (position < 0 || static_cast<uint32_t>(position) >= open_.prompt_tokens()) {
      return Broken("the skeleton holds position ", position, " of ", open_.prompt_tokens(),
                    " tokens");
    }
  }
  result.centrality = Values<float>(pivot_->centrality.bytes);
  pivot_.reset();
  pivot_done_ = true;
  return result;
}

absl::StatusOr<v1::Summary> Assembler::Finish(uint64_t sent_bytes) const {
  if (!summary_.has_value()) {
    return Broken("the stream ended without a summary");
  }
  const uint32_t layers = open_.geometry().layer_count();
  if (summary_->layer_count() != layers) {
    return Disagrees("layer_count", summary_->layer_count(), " of ", layers);
  }
  if (answered_.size() != layers) {
    return Broken("a summary came after ", answered_.size(), " of ", layers, " layers");
  }
  if (HasSkeleton(opened_->method()) && !pivot_done_) {
    return Broken("a summary came without a pivot");
  }
  if (summary_->input_bytes() != sent_bytes) {
    return Disagrees("input_bytes", summary_->input_bytes(), ", sent were ", sent_bytes);
  }
  if (summary_->output_bytes() != received_bytes_) {
    return Disagrees("output_bytes", summary_->output_bytes(), ", received were ", received_bytes_);
  }
  if (summary_->logical_length() != open_.prompt_tokens()) {
    return Disagrees("logical_length", summary_->logical_length(), ", the prompt has ",
                     open_.prompt_tokens(), " tokens");
  }
  const auto& kept = opened_->kept_tokens();
  const uint32_t largest = kept.empty() ? 0 : *std::max_element(kept.begin(), kept.end());
  if (summary_->kv_length() != largest) {
    return Disagrees("kv_length", summary_->kv_length(), ", Opened.kept_tokens says ", largest);
  }
  if (summary_->kv_blocks() != KeptBlocks(open_, largest)) {
    return Disagrees("kv_blocks", summary_->kv_blocks(), ", ", largest, " tokens fill ",
                     KeptBlocks(open_, largest));
  }
  if (summary_->values_in_keys() != open_.geometry().values_in_keys()) {
    return Disagrees("values_in_keys", summary_->values_in_keys() ? "true" : "false",
                     ", Open said otherwise");
  }
  const uint32_t next = open_.has_rotary() ? largest : open_.prompt_tokens();
  if (summary_->next_position() != next) {
    return Disagrees("next_position", summary_->next_position(), ", it must be ", next);
  }
  if (summary_->fingerprint() != opened_->fingerprint()) {
    return Disagrees("fingerprint", summary_->fingerprint(), ", Opened said ",
                     opened_->fingerprint());
  }
  const bool holds = open_.output() == v1::OUTPUT_HOLD;
  if (summary_->has_held() != holds) {
    return Disagrees("held", holds ? "not set" : "set", ", Open.output said otherwise");
  }
  if (holds && summary_->held().handle().size() != kHandleBytes) {
    return Disagrees("held.handle", summary_->held().handle().size(), " bytes long, ", kHandleBytes,
                     " are due");
  }
  return *summary_;
}

}  // namespace structkv::client::internal
