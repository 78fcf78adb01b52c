#include "tests/testing/answer.h"

#include <cstring>

#include "absl/strings/str_cat.h"

namespace structkv::testkit {
namespace {

class Assembler {
 public:
  explicit Assembler(Answer* answer) : answer_(*answer) {}

  void Add(const v1::CompressResponse& response) {
    const size_t index = count_++;
    if (answer_.summary) Fault("a message after the summary");
    if (open_layer_ && !response.has_layer()) Fault("a layer's messages are not contiguous");
    if (open_pull_ && !response.has_pull()) Fault("a pull's messages are not contiguous");
    if (response.has_opened()) {
      if (index != 0) Fault("opened is not the first message");
      answer_.opened = response.opened();
    } else if (response.has_layer()) {
      AddLayer(response.layer());
    } else if (response.has_pivot()) {
      AddPivot(response.pivot());
    } else if (response.has_pull()) {
      AddPull(response.pull());
    } else if (response.has_summary()) {
      answer_.summary = response.summary();
    } else {
      Fault("a message with nothing set");
    }
    if (index == 0 && !response.has_opened()) Fault("the first message is not opened");
  }

  void End() {
    if (open_layer_) Fault("the last layer is not complete");
    for (const auto& [index, pulled] : answer_.pulls) {
      if (!pulled.pull.complete()) Fault("a pull is not complete");
      const auto layer = answer_.layers.find(index);
      if (layer == answer_.layers.end()) {
        Fault("a layer was pulled and not answered");
      } else if (layer->second.tensors[v1::TENSOR_POSITIONS] != pulled.positions ||
                 layer->second.kept_tokens != pulled.pull.kept_tokens()) {
        Fault("a layer's answer has other positions than its pull");
      }
    }
    if (answer_.pivot && !answer_.pivot->decision.complete()) Fault("the pivot is not complete");
  }

 private:
  void Fault(std::string text) { answer_.faults.push_back(std::move(text)); }

  void AddLayer(const v1::LayerResult& result) {
    const bool first = !open_layer_;
    if (first && answer_.layers.contains(result.layer())) {
      Fault(absl::StrCat("layer ", result.layer(), " was answered twice"));
    }
    if (!first && *open_layer_ != result.layer()) Fault("two layers' messages are interleaved");
    LayerAnswer& layer = answer_.layers[result.layer()];
    if (first) {
      answer_.order.push_back(result.layer());
      layer.kept_tokens = result.kept_tokens();
      layer.kept_blocks = result.kept_blocks();
      if (result.has_metrics()) layer.metrics = result.metrics();
    } else if (result.has_metrics()) {
      Fault("metrics outside of a layer's first message");
    }
    if (result.kept_tokens() != layer.kept_tokens) Fault("kept_tokens changes within a layer");
    if (result.kept_blocks() != layer.kept_blocks) Fault("kept_blocks changes within a layer");
    for (const v1::TensorPiece& piece : result.pieces()) {
      if (piece.layer() != result.layer()) Fault("a piece of another layer");
      AddPiece(piece,
               {v1::TENSOR_POSITIONS, v1::TENSOR_KEYS, v1::TENSOR_VALUES, v1::TENSOR_KEY_SCALES,
                v1::TENSOR_VALUE_SCALES, v1::TENSOR_SALIENCY},
               &layer.tensors);
    }
    open_layer_ = result.complete() ? std::nullopt : std::optional(result.layer());
    if (result.complete()) last_tensor_ = 0;
  }

  void AddPull(const v1::RowPull& pull) {
    const bool first = !open_pull_;
    if (first && answer_.pulls.contains(pull.layer())) Fault("a layer was pulled twice");
    if (answer_.layers.contains(pull.layer())) Fault("a layer was pulled after its answer");
    if (!first && *open_pull_ != pull.layer()) Fault("two pulls are interleaved");
    PullAnswer& answer = answer_.pulls[pull.layer()];
    for (const v1::TensorPiece& piece : pull.pieces()) {
      if (piece.layer() != pull.layer() || piece.tensor() != v1::TENSOR_POSITIONS ||
          piece.offset_bytes() != answer.positions.size()) {
        Fault("a pull's piece is out of place");
      }
      answer.positions += piece.data();
    }
    answer.pull = pull;
    answer.pull.clear_pieces();
    open_pull_ = pull.complete() ? std::nullopt : std::optional(pull.layer());
  }

  void AddPivot(const v1::PivotDecision& decision) {
    if (!answer_.pivot) {
      answer_.pivot.emplace();
      answer_.pivot->decision = decision;
      answer_.layers_before_pivot = answer_.layers.size();
    } else if (answer_.pivot->decision.complete()) {
      Fault("a second pivot");
    } else if (decision.layers_size() != 0) {
      Fault("the pivot's layers outside of its first message");
    }
    for (const v1::TensorPiece& piece : decision.pieces()) {
      AddPiece(piece, {v1::TENSOR_SKELETON_POSITIONS, v1::TENSOR_CENTRALITY},
               &answer_.pivot->tensors);
    }
    answer_.pivot->decision.clear_pieces();
    answer_.pivot->decision.set_complete(decision.complete());
    if (decision.complete()) last_tensor_ = 0;
  }

  // Pieces come tensor by tensor in `order`, without gaps.
  void AddPiece(const v1::TensorPiece& piece, const std::vector<v1::Tensor>& order,
                std::map<v1::Tensor, std::string>* tensors) {
    size_t rank = 0;
    while (rank < order.size() && order[rank] != piece.tensor()) ++rank;
    if (rank == order.size() || rank < last_tensor_) Fault("a tensor out of order");
    last_tensor_ = rank;
    std::string& bytes = (*tensors)[piece.tensor()];
    if (piece.offset_bytes() != bytes.size()) Fault("a piece out of order");
    bytes += piece.data();
  }

  Answer& answer_;
  size_t count_ = 0;
  size_t last_tensor_ = 0;
  std::optional<uint32_t> open_layer_;
  std::optional<uint32_t> open_pull_;
};

template <typename T>
std::vector<T> As(const std::string& bytes) {
  std::vector<T> out(bytes.size() / sizeof(T));
  std::memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
  return out;
}

}  // namespace

Answer Assemble(const Outcome& outcome) {
  Answer answer;
  Assembler assembler(&answer);
  for (const v1::CompressResponse& response : outcome.responses) assembler.Add(response);
  if (outcome.status.ok()) {
    assembler.End();
    if (!answer.summary) answer.faults.emplace_back("OK without a summary");
  } else if (answer.summary) {
    answer.faults.emplace_back("a summary without OK");
  }
  return answer;
}

std::string ResultBytes(const Answer& answer) {
  std::string out;
  auto number = [&](double value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof(value));
  };
  auto metrics = [&](const v1::LayerMetrics& m) {
    number(m.entropy());
    number(m.sparsity());
    number(m.variance());
    number(m.transition());
  };
  auto tensors = [&](const std::map<v1::Tensor, std::string>& all) {
    for (const auto& [tensor, bytes] : all) {
      absl::StrAppend(&out, ";", static_cast<int>(tensor), ":", bytes.size(), ":");
      out += bytes;
    }
  };
  for (const auto& [index, layer] : answer.layers) {
    absl::StrAppend(&out, ";layer ", index, ":", layer.kept_tokens, ":");
    if (layer.metrics) metrics(*layer.metrics);
    tensors(layer.tensors);
  }
  if (answer.pivot) {
    const v1::PivotDecision& decision = answer.pivot->decision;
    absl::StrAppend(&out, ";pivot ", decision.pivot_layer(), ":",
                    decision.has_transition_layer() ? decision.transition_layer() : -1.0, ":",
                    decision.decided_at_layer(), ":",
                    decision.has_skeleton_from_layer() ? decision.skeleton_from_layer() : -1.0,
                    ":");
    for (const v1::LayerMetrics& m : decision.layers()) metrics(m);
    tensors(answer.pivot->tensors);
  }
  if (answer.summary) {
    absl::StrAppend(&out, ";summary ", answer.summary->layer_count(), ":",
                    answer.summary->input_bytes(), ":", answer.summary->output_bytes(), ":",
                    answer.summary->fingerprint());
  }
  return out;
}

std::vector<int32_t> AsInts(const std::string& bytes) { return As<int32_t>(bytes); }
std::vector<float> AsFloats(const std::string& bytes) { return As<float>(bytes); }

}  // namespace structkv::testkit
