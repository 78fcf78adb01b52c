// The service's assembler against a model that keeps a byte map: the same verdict on every piece,
// the same bytes in every layer, from messages and from shared memory.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "service/session/layer_assembler.h"
#include "service/transport/shared_memory.h"
#include "structkv/v1/piece_codec.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/testing/shared_region.h"

namespace structkv::session {
namespace {

using fuzz::FuzzInput;
using Taken = LayerAssembler::Taken;

// `shared`: over shared memory.
engine::PromptSpec MakeSpec(FuzzInput* input, bool* shared) {
  engine::PromptSpec spec;
  spec.geometry = {.layers = input->Between(1, 4), .query_heads = 2, .kv_heads = 1, .key_dim = 2};
  spec.geometry.value_dim = input->Between(1, 3);
  spec.prompt_tokens = input->Between(1, 4);
  const uint8_t flags = input->Byte();
  spec.method = method::MethodSpec::Defaults((flags & 1) != 0 ? method::Method::kFull
                                                              : method::Method::kStructKv);
  if (!spec.method.needs_statistics()) {
    spec.statistic = engine::Statistic::kNone;
  } else if ((flags & 2) != 0) {
    spec.statistic = engine::Statistic::kSaliency;
  }
  spec.window_lse = (flags & 4) != 0 && spec.statistic == engine::Statistic::kWindowQueries;
  spec.plan_only = (flags & 8) != 0;
  *shared = (flags & 32) != 0;
  if ((flags & 16) != 0) {  // layers of skeleton rows may come, of fewer tokens than the prompt
    spec.method.pivot.mode = method::PivotMode::kFixed;
    spec.method.window = 1;
    spec.method.skeleton_budget.ratio = 0.5;
  }
  return spec;
}

// A client's memory, with bytes that differ.
class PeerMemory {
 public:
  static constexpr uint64_t kBytes = 1024;

  PeerMemory() {
    for (uint64_t i = 0; i < kBytes; ++i) file_->data()[i] = static_cast<char>(i * i / 7);
    transport::FileDescriptor file(dup(file_->fd()));
    const auto region = registry_.AddDescriptor(std::move(file), {.size_bytes = kBytes});
    FUZZ_CHECK(region.ok());
    handle_ = region->handle;
  }

  std::shared_ptr<const transport::Transport> Granted() {
    return *transport::GrantSharedMemory(registry_, {.regions = {handle_}}, {});
  }
  static bool Has(const transport::RegionRange& range) {
    return range.region == 0 && range.size_bytes > 0 && range.offset_bytes < kBytes &&
           range.size_bytes <= kBytes - range.offset_bytes;
  }
  std::string Bytes(const transport::RegionRange& range) const {
    return Has(range) ? std::string(file_->data() + range.offset_bytes, range.size_bytes) : "";
  }

 private:
  const std::unique_ptr<testkit::SharedFile> file_ = testkit::SharedFile::Sealed(kBytes);
  transport::RegionRegistry registry_{transport::RegionOptions{}};
  std::string handle_;
};

PeerMemory& Peer() {
  static auto* const memory = new PeerMemory();
  return *memory;
}

// One tensor of one layer.
struct ModelTensor {
  std::string bytes;
  std::vector<int> piece_of;                     // of each byte; 0: did not come
  std::set<std::pair<int64_t, int64_t>> pieces;  // offset, size
  std::optional<transport::RegionRange> range;   // of a tensor in place

  int64_t missing() const { return std::count(piece_of.begin(), piece_of.end(), 0); }
};

constexpr auto kPositions = engine::InputTensor::kPositions;

class Model {
 public:
  Model(const engine::PromptSpec& spec, int64_t layers_in_flight, bool shared)
      : spec_(spec),
        shared_(shared),
        layers_in_flight_(layers_in_flight),
        layers_(static_cast<size_t>(spec.geometry.layers)),
        is_skeleton_(layers_.size()) {
    for (auto& layer : layers_) {
      for (const engine::InputTensor tensor : spec.RequiredTensors()) {
        SetSize(spec.InputBytes(tensor), &layer[tensor]);
      }
    }
  }

  // Layers from `from` on may come as the rows of `skeleton`.
  void Allow(std::vector<int32_t> skeleton, std::optional<int64_t> from) {
    skeleton_ = std::move(skeleton);
    from_ = from;
  }
  bool is_skeleton(int64_t layer) const { return is_skeleton_[static_cast<size_t>(layer)]; }
  const std::vector<int32_t>& skeleton() const { return skeleton_; }

  bool IsComplete(size_t layer) const {
    for (const auto& [tensor, model] : layers_[layer]) {
      if (model.missing() > 0) return false;
    }
    return true;
  }
  size_t LowestUnfinished() const {
    size_t layer = 0;
    while (layer < layers_.size() && IsComplete(layer)) ++layer;
    return layer;
  }
  const ModelTensor* Find(int64_t layer, engine::InputTensor tensor) const {
    const auto& tensors = layers_[static_cast<size_t>(layer)];
    const auto found = tensors.find(tensor);
    return found == tensors.end() ? nullptr : &found->second;
  }

  // What becomes of a piece; records it where it is new. `holders`: layers with buffers.
  absl::StatusCode Take(const InputPiece& piece, const std::string& data,
                        const std::map<int64_t, bool>& holders, std::optional<Taken>* taken) {
    if (piece.layer < 0 || piece.layer >= static_cast<int64_t>(layers_.size())) {
      return absl::StatusCode::kOutOfRange;
    }
    if (!IsInTurn(piece)) return absl::StatusCode::kInvalidArgument;
    // Nothing came of a layer that its positions are about to make one of skeleton rows.
    const bool becomes = piece.tensor == kPositions && !is_skeleton(piece.layer);
    ModelTensor fresh;
    SetSize(spec_.SkeletonInputBytes(kPositions), &fresh);
    auto* tensor = becomes ? &fresh : const_cast<ModelTensor*>(Find(piece.layer, piece.tensor));
    const auto size = static_cast<int64_t>(data.size());
    if (tensor == nullptr || size == 0 || piece.offset_bytes < 0 ||
        piece.offset_bytes + size > static_cast<int64_t>(tensor->bytes.size())) {
      return absl::StatusCode::kInvalidArgument;
    }
    const bool in_place = shared_ && (piece.tensor == engine::InputTensor::kKeys ||
                                      piece.tensor == engine::InputTensor::kValues);
    if (piece.range.has_value() && (!shared_ || !PeerMemory::Has(*piece.range))) {
      return absl::StatusCode::kInvalidArgument;
    }
    if (in_place && (!piece.range.has_value() || piece.offset_bytes != 0 ||
                     data.size() != tensor->bytes.size() || piece.range->offset_bytes % 64 != 0)) {
      return absl::StatusCode::kInvalidArgument;
    }
    const auto at = static_cast<size_t>(piece.offset_bytes);
    const bool known = tensor->pieces.contains({piece.offset_bytes, size});
    if (!known) {
      for (size_t i = at; i < at + data.size(); ++i) {
        if (tensor->piece_of[i] != 0) return absl::StatusCode::kInvalidArgument;
      }
      if (piece.layer >= static_cast<int64_t>(LowestUnfinished()) + layers_in_flight_) {
        return absl::StatusCode::kInvalidArgument;
      }
      if (!holders.contains(piece.layer) &&
          static_cast<int64_t>(holders.size()) >= layers_in_flight_) {
        *taken = Taken::kNoBuffer;
        return absl::StatusCode::kOk;
      }
    }
    const absl::Span<const std::byte> all(reinterpret_cast<const std::byte*>(data.data()),
                                          data.size());
    *taken = Taken::kYes;
    if (known && in_place) {
      return tensor->range == piece.range ? absl::StatusCode::kOk
                                          : absl::StatusCode::kAlreadyExists;
    }
    if (piece.xxh3_64.has_value() && *piece.xxh3_64 != wire::Checksum({all})) {
      return absl::StatusCode::kDataLoss;
    }
    if (known) {
      // Pieces are shorter than what is sampled of those without a checksum.
      return tensor->bytes.compare(at, data.size(), data) == 0 ? absl::StatusCode::kOk
                                                               : absl::StatusCode::kAlreadyExists;
    }
    if (piece.tensor == kPositions &&
        std::memcmp(data.data(), reinterpret_cast<const char*>(skeleton_.data()) + at,
                    data.size()) != 0) {
      return absl::StatusCode::kInvalidArgument;
    }
    if (becomes) {
      BecomeSkeleton(piece.layer);
      tensor = const_cast<ModelTensor*>(Find(piece.layer, piece.tensor));
    }
    if (in_place) tensor->range = piece.range;
    tensor->pieces.insert({piece.offset_bytes, size});
    std::fill_n(tensor->piece_of.begin() + piece.offset_bytes, size, 1);
    tensor->bytes.replace(at, data.size(), data);
    received_ += size;
    return absl::StatusCode::kOk;
  }

  int64_t received() const { return received_; }
  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }

 private:
  static void SetSize(int64_t bytes, ModelTensor* tensor) {
    const auto size = static_cast<size_t>(bytes);
    *tensor = {.bytes = std::string(size, '\0'), .piece_of = std::vector<int>(size), .pieces = {}};
  }

  // Positions come first, once they may.
  bool IsInTurn(const InputPiece& piece) const {
    const auto& tensors = layers_[static_cast<size_t>(piece.layer)];
    if (is_skeleton(piece.layer)) {
      return piece.tensor == kPositions || tensors.at(kPositions).missing() == 0;
    }
    if (piece.tensor != kPositions) return true;
    if (!from_.has_value() || piece.layer < *from_) return false;
    return std::all_of(tensors.begin(), tensors.end(),
                       [](const auto& entry) { return entry.second.pieces.empty(); });
  }

  void BecomeSkeleton(int64_t layer) {
    auto& tensors = layers_[static_cast<size_t>(layer)];
    is_skeleton_[static_cast<size_t>(layer)] = true;
    for (auto& [tensor, model] : tensors) SetSize(spec_.SkeletonInputBytes(tensor), &model);
    SetSize(spec_.SkeletonInputBytes(kPositions), &tensors[kPositions]);
  }

  const engine::PromptSpec& spec_;
  const bool shared_;
  const int64_t layers_in_flight_;
  std::vector<std::map<engine::InputTensor, ModelTensor>> layers_;
  std::vector<bool> is_skeleton_;  // of each layer
  std::vector<int32_t> skeleton_;
  std::optional<int64_t> from_;
  int64_t received_ = 0;
};

void CheckLayer(const Model& model, engine::LayerInput input) {
  const std::pair<engine::InputTensor, const engine::Buffer*> tensors[] = {
      {engine::InputTensor::kKeys, &input.keys},
      {engine::InputTensor::kValues, &input.values},
      {engine::InputTensor::kWindowQueries, &input.window_queries},
      {engine::InputTensor::kWindowLse, &input.window_lse},
      {engine::InputTensor::kSaliency, &input.saliency},
      {engine::InputTensor::kKeyScales, &input.key_scales},
      {engine::InputTensor::kValueScales, &input.value_scales}};
  const bool skeleton_rows = model.is_skeleton(input.layer);
  FUZZ_CHECK(input.positions ==
             (skeleton_rows ? absl::MakeConstSpan(model.skeleton()) : absl::Span<const int32_t>()));
  for (const auto& [tensor, buffer] : tensors) {
    const ModelTensor* expected = model.Find(input.layer, tensor);
    FUZZ_CHECK((expected == nullptr ? 0 : expected->bytes.size()) == buffer->size());
    if (expected == nullptr) continue;
    FUZZ_CHECK(expected->missing() == 0);
    FUZZ_CHECK(std::memcmp(expected->bytes.data(), buffer->data(), buffer->size()) == 0);
  }
}

void Run(FuzzInput input) {
  bool shared = false;
  const engine::PromptSpec spec = MakeSpec(&input, &shared);
  const std::shared_ptr<const transport::Transport> transport =
      shared ? Peer().Granted() : transport::InlineTransport();
  const int64_t layers_in_flight = input.Between(1, spec.geometry.layers);
  engine::BufferPool pool(1 << 20);
  LayerAssembler assembler(&spec, &pool, layers_in_flight, transport.get());
  Model model(spec, layers_in_flight, shared);
  const std::atomic<bool> stop{false};
  std::map<int64_t, bool> holders;  // layers with buffers; true: popped
  if (spec.RequiredTensors().empty()) {
    for (int64_t layer = 0; layer < spec.geometry.layers; ++layer) holders[layer] = false;
  }
  while (!input.empty()) {
    const uint8_t op = input.Byte();
    if (op % 8 == 0) {
      std::optional<engine::LayerInput> layer = assembler.PopComplete();
      if (!layer.has_value()) continue;
      FUZZ_CHECK(holders.contains(layer->layer) && !holders[layer->layer]);
      holders[layer->layer] = true;
      CheckLayer(model, *std::move(layer));
      continue;
    }
    if (op % 8 == 1) {
      for (auto it = holders.begin(); it != holders.end(); ++it) {
        if (!it->second) continue;
        assembler.LayerDone();
        holders.erase(it);
        break;
      }
      continue;
    }
    if (op % 8 == 7) {
      if (!spec.may_have_skeleton_layers() || !model.skeleton().empty()) continue;
      std::vector<int32_t> skeleton(static_cast<size_t>(spec.skeleton_tokens()));
      const auto first = input.Between(0, spec.prompt_tokens - spec.skeleton_tokens());
      std::iota(skeleton.begin(), skeleton.end(), static_cast<int32_t>(first));
      std::optional<int64_t> from = input.Between(0, spec.geometry.layers);
      if (*from == spec.geometry.layers) from.reset();
      model.Allow(skeleton, from);
      assembler.SetSkeleton(std::make_shared<const engine::Skeleton>(
          engine::Skeleton{.from_layer = from, .positions = std::move(skeleton)}));
      continue;
    }
    InputPiece piece;
    piece.layer = input.Between(0, spec.geometry.layers);
    piece.tensor = static_cast<engine::InputTensor>(input.Between(0, engine::kInputTensors - 1));
    piece.offset_bytes = static_cast<int8_t>(input.Byte());
    // Mostly the bytes that belong there, so that pieces which come again are the same.
    std::string data(input.Byte() % 64, '\0');
    for (size_t i = 0; i < data.size(); ++i) {
      data[i] = static_cast<char>(piece.offset_bytes + static_cast<int64_t>(i) * 3 + op / 128);
    }
    if (piece.tensor == kPositions && op < 128) {
      const std::string skeleton(reinterpret_cast<const char*>(model.skeleton().data()),
                                 model.skeleton().size() * sizeof(int32_t));
      const auto at = static_cast<size_t>(std::max<int64_t>(piece.offset_bytes, 0));
      if (at < skeleton.size()) data.replace(0, data.size(), skeleton, at, data.size());
    }
    absl::Span<const std::byte> all(reinterpret_cast<const std::byte*>(data.data()), data.size());
    const size_t cut = std::min<size_t>(input.Byte(), data.size());
    piece.data = {all.subspan(0, cut), all.subspan(cut)};
    if ((op & 8) != 0) {  // mostly a whole tensor, aligned
      piece.data.clear();
      piece.range = {static_cast<uint32_t>(input.Byte() / 255), input.Byte() / 16 * uint64_t{64},
                     data.size()};
      const ModelTensor* tensor =
          piece.layer < model.layers() ? model.Find(piece.layer, piece.tensor) : nullptr;
      if (op < 192 && tensor != nullptr) {
        piece.range->size_bytes = tensor->bytes.size();
        if (op < 128) piece.offset_bytes = 0;
      } else {
        piece.range->offset_bytes += input.Byte();
      }
      data = Peer().Bytes(*piece.range);
      all = {reinterpret_cast<const std::byte*>(data.data()), data.size()};
    }
    if ((op & 16) != 0) piece.xxh3_64 = wire::Checksum({all});
    if ((op & 16) != 0 && (op & 96) == 96) *piece.xxh3_64 ^= 1;

    const int64_t received = model.received();
    std::optional<Taken> expected;
    const absl::StatusCode code = model.Take(piece, data, holders, &expected);
    const absl::StatusOr<Taken> taken = assembler.Take(piece, stop);
    FUZZ_CHECK(taken.status().code() == code);
    if (!taken.ok()) return;
    FUZZ_CHECK(*taken == expected);
    if (model.received() > received) holders.try_emplace(piece.layer, false);
    FUZZ_CHECK(assembler.received_bytes() == model.received());
  }
  const bool complete = static_cast<int64_t>(model.LowestUnfinished()) == model.layers();
  FUZZ_CHECK(assembler.CheckCommit(model.layers(), model.received()).ok() == complete);
  FUZZ_CHECK(!assembler.CheckCommit(model.layers() + 1, model.received()).ok());
  FUZZ_CHECK(!assembler.CheckCommit(model.layers(), model.received() + 1).ok());
}

}  // namespace
}  // namespace structkv::session

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  structkv::session::Run({data, size});
  return 0;
}
