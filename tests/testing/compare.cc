#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "tests/testing/answer.h"
#include "tests/testing/rotation.h"

namespace structkv::testkit {
namespace {

class Comparison {
 public:
  Comparison(const PromptData& data, const Answer& answer)
      : data_(data), effective_(data.effective()), answer_(answer), oracle_(data) {
    const bool given = effective_.statistic == v1::STATISTIC_SALIENCY ||
                       effective_.statistic == v1::STATISTIC_SALIENCY_PER_KV_HEAD;
    exact_ = given && effective_.pooling != v1::POOLING_AVG;
  }

  std::vector<std::string> Run() {
    Opened();
    Results();
    Summary();
    return std::move(faults_);
  }

  std::vector<std::string> RunResults() {
    Results();
    return std::move(faults_);
  }

 private:
  void Results() {
    for (uint32_t layer = 0; layer < data_.layers(); ++layer) Layer(layer);
    Equal(answer_.layers.size(), data_.layers(), "layers answered");
    Pivot();
  }

  template <typename A, typename B>
  void Equal(const A& got, const B& want, const std::string& what) {
    if (got != want) faults_.push_back(absl::StrCat(what, ": ", got, ", want ", want));
  }

  void Near(double got, double want, const std::string& what) {
    if (!(std::fabs(got - want) <= 1e-4 * (1 + std::fabs(want)))) {
      faults_.push_back(absl::StrCat(what, ": ", got, ", want ", want));
    }
  }

  void Opened() {
    if (!answer_.opened) {
      faults_.emplace_back("no opened");
      return;
    }
    const v1::Opened& opened = *answer_.opened;
    Equal(opened.kept_tokens_size(), static_cast<int>(data_.layers()), "opened.kept_tokens");
    for (int l = 0; l < std::min(opened.kept_tokens_size(), static_cast<int>(data_.layers()));
         ++l) {
      Equal(opened.kept_tokens(l), effective_.layers[l], "opened.kept_tokens");
    }
    Equal(opened.skeleton_tokens(), effective_.skeleton, "opened.skeleton_tokens");
    Equal(opened.window_tokens(), effective_.window, "opened.window_tokens");
    Equal(static_cast<int>(opened.statistic()), static_cast<int>(effective_.statistic),
          "opened.statistic");
    if (!std::equal(opened.required_tensors().begin(), opened.required_tensors().end(),
                    effective_.tensors.begin(), effective_.tensors.end())) {
      faults_.emplace_back("opened.required_tensors");
    }
    if (opened.reserved_bytes() == 0) faults_.emplace_back("opened.reserved_bytes is 0");
    if (opened.session_id().empty()) faults_.emplace_back("opened.session_id is empty");
    Equal(opened.fingerprint().size(), 32U, "opened.fingerprint");
  }

  // `scores` rank the tokens before the window; the last window's tokens must be there too.
  void Positions(const std::vector<int32_t>& got, const std::vector<double>& scores,
                 uint32_t tokens, size_t keep, bool exact, const std::string& what) {
    Equal(got.size(), keep, what);
    std::vector<bool> kept(scores.size());
    size_t window = 0;
    int32_t previous = -1;
    for (int32_t position : got) {
      if (position <= previous || position >= static_cast<int32_t>(tokens)) {
        faults_.push_back(absl::StrCat(what, ": ", position, " after ", previous));
        return;
      }
      previous = position;
      if (position < static_cast<int32_t>(scores.size())) {
        kept[position] = true;
      } else {
        ++window;
      }
    }
    Equal(window, tokens - scores.size(), what + ", window");
    std::vector<size_t> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return scores[a] > scores[b]; });
    const size_t best = keep - window;
    for (size_t i = 0; i < order.size(); ++i) {
      const bool should = i < best;
      if (kept[order[i]] == should) continue;
      // The first score on the other side of the cut.
      const double limit = scores[order[should ? best : best - 1]];
      if (exact || best == 0 || best == order.size() ||
          std::fabs(scores[order[i]] - limit) > kScoreTolerance * scores[order[0]]) {
        faults_.push_back(absl::StrCat(what, ": token ", order[i], should ? " left" : " kept",
                                       ", score ", scores[order[i]], " beside ", limit));
      }
    }
  }

  // Of paged keys that come back.
  uint32_t Blocks(uint32_t kept) const {
    const uint32_t size = data_.open().paged().block_tokens();
    return size == 0 || effective_.plan ? 0 : (kept + size - 1) / size;
  }

  std::vector<double> RowScores(uint32_t layer, size_t row) const {
    if (effective_.statistic != v1::STATISTIC_NONE) return oracle_.layers[layer].ranked[row];
    // First `sinks` tokens and the latest; everything for Full.
    const uint32_t tokens = data_.open().prompt_tokens();
    std::vector<double> scores(tokens);
    for (uint32_t j = 0; j < tokens; ++j) scores[j] = j < effective_.sinks ? 2.0 * tokens : j;
    return scores;
  }

  void Rows(const std::string& got, v1::Tensor tensor, uint32_t layer, size_t dim,
            const std::vector<int32_t>& positions, size_t kept, const std::string& what) {
    const std::string& source = data_.tensor(layer, tensor);
    const size_t row = dim * ElementBytes(data_.open().dtype());
    const size_t heads = data_.open().geometry().kv_head_count();
    const size_t rows = OutputRows(data_.open(), kept);
    Equal(got.size(), rows * row, what + " bytes");
    if (got.size() != rows * row) return;
    std::vector<bool> filled(rows);
    for (size_t h = 0; h < heads; ++h) {
      for (size_t i = 0; i < kept; ++i) {
        const auto token = static_cast<size_t>(positions[(effective_.per_head ? h * kept : 0) + i]);
        const size_t from = data_.RowIndex(layer, h, token) * row;
        filled[OutputRowIndex(data_.open(), kept, h, i)] = true;
        const size_t to = OutputRowIndex(data_.open(), kept, h, i) * row;
        const bool turned = tensor == v1::TENSOR_KEYS && data_.open().has_rotary();
        const auto place = static_cast<uint32_t>(i);
        const TurnedKey key = {
            .source = source,
            .from = from / row * dim,
            .got = got,
            .to = to / row * dim,
            .position = Original(layer, token),
            .new_position = effective_.largest - static_cast<uint32_t>(kept) + place,
            .kv_length = effective_.largest};
        if (turned ? !IsTurned(data_.open(), key) : got.compare(to, row, source, from, row) != 0) {
          faults_.push_back(absl::StrCat(what, ": head ", h, ", token ", token, " differs"));
          return;
        }
      }
    }
    for (size_t i = 0; i < rows; ++i) {
      if (!filled[i] && got.compare(i * row, row, std::string(row, '\0')) != 0) {
        faults_.push_back(absl::StrCat(what, ": row ", i, " of a last block is not zero"));
        return;
      }
    }
  }

  // The position in the prompt of a row of the layer.
  uint32_t Original(uint32_t layer, size_t row) const {
    const std::vector<int32_t>& rows = data_.rows(layer);
    return static_cast<uint32_t>(rows.empty() ? static_cast<int32_t>(row) : rows[row]);
  }

  // Positions of the prompt as rows of the layer.
  std::vector<int32_t> Local(uint32_t index, std::vector<int32_t> positions,
                             const std::string& name) {
    const std::vector<int32_t>& rows = data_.rows(index);
    if (rows.empty()) return positions;
    for (int32_t& position : positions) {
      const auto at = std::lower_bound(rows.begin(), rows.end(), position);
      if (at == rows.end() || *at != position) {
        faults_.push_back(absl::StrCat(name, ": token ", position, " is not of the skeleton"));
        return {};
      }
      position = static_cast<int32_t>(at - rows.begin());
    }
    return positions;
  }

  void Layer(uint32_t index) {
    const auto it = answer_.layers.find(index);
    const std::string name = absl::StrCat("layer ", index);
    if (it == answer_.layers.end()) {
      faults_.push_back(name + " was not answered");
      return;
    }
    const LayerAnswer& layer = it->second;
    const uint32_t tokens = data_.tokens(index);
    const uint32_t kept = std::min(effective_.layers[index], tokens);
    Equal(layer.kept_tokens, kept, name + " kept_tokens");
    Equal(layer.kept_blocks, Blocks(kept), name + " kept_blocks");
    if (kept == 0) {
      Equal(layer.tensors.size(), 0U, name + " tensors");
      Equal(layer.metrics.has_value(), false, name + " metrics");
      return;
    }
    const size_t rows = effective_.per_head ? data_.open().geometry().kv_head_count() : 1;
    const std::vector<int32_t> positions =
        Local(index, AsInts(Tensor(layer.tensors, v1::TENSOR_POSITIONS)), name);
    Equal(positions.size(), size_t{kept} * rows, name + " positions");
    if (positions.size() != size_t{kept} * rows) return;
    for (size_t row = 0; row < rows; ++row) {
      const std::vector<int32_t> part(positions.begin() + row * kept,
                                      positions.begin() + (row + 1) * kept);
      Positions(part, RowScores(index, row), tokens, kept,
                exact_ || effective_.statistic == v1::STATISTIC_NONE,
                absl::StrCat(name, " row ", row));
    }
    if (!faults_.empty()) return;
    if (effective_.plan) {
      Equal(layer.tensors.count(v1::TENSOR_KEYS) + layer.tensors.count(v1::TENSOR_VALUES) +
                layer.tensors.count(v1::TENSOR_KEY_SCALES),
            0U, name + " tensors of a plan");
    } else {
      for (const v1::Tensor scales : {v1::TENSOR_KEY_SCALES, v1::TENSOR_VALUE_SCALES}) {
        Equal(Tensor(layer.tensors, scales) == data_.tensor(index, scales), true, name + " scales");
      }
      Rows(Tensor(layer.tensors, v1::TENSOR_KEYS), v1::TENSOR_KEYS, index,
           data_.open().geometry().key_dim(), positions, kept, name + " keys");
      if (data_.open().geometry().values_in_keys()) {
        Equal(layer.tensors.count(v1::TENSOR_VALUES), 0U, name + " values beside the keys");
      } else {
        Rows(Tensor(layer.tensors, v1::TENSOR_VALUES), v1::TENSOR_VALUES, index,
             effective_.value_dim, positions, kept, name + " values");
      }
    }
    Equal(layer.metrics.has_value(), effective_.statistic != v1::STATISTIC_NONE, name + " metrics");
    if (layer.metrics) Metrics(*layer.metrics, index, name);
    if (data_.open().return_saliency()) Saliency(layer, index, name);
  }

  void Metrics(const v1::LayerMetrics& metrics, uint32_t index, const std::string& name) {
    Equal(metrics.layer(), index, name + " metrics.layer");
    Near(metrics.entropy(), oracle_.layers[index].entropy, name + " entropy");
    Near(metrics.sparsity(), oracle_.layers[index].sparsity, name + " sparsity");
    Near(metrics.variance(), oracle_.layers[index].variance, name + " variance");
  }

  void Saliency(const LayerAnswer& layer, uint32_t index, const std::string& name) {
    const std::vector<float> got = AsFloats(Tensor(layer.tensors, v1::TENSOR_SALIENCY));
    std::vector<double> want = oracle_.layers[index].saliency;
    if (effective_.per_head) {
      want.clear();
      for (const auto& head : oracle_.layers[index].per_head) {
        want.insert(want.end(), head.begin(), head.end());
      }
    }
    Equal(got.size(), want.size(), name + " saliency");
    for (size_t j = 0; j < std::min(got.size(), want.size()); ++j) {
      Near(got[j], want[j], absl::StrCat(name, " saliency of token ", j));
    }
  }

  void Pivot() {
    Equal(answer_.pivot.has_value(), oracle_.pivot.has_value(), "pivot");
    if (!answer_.pivot || !oracle_.pivot) return;
    const v1::PivotDecision& decision = answer_.pivot->decision;
    Equal(decision.pivot_layer(), oracle_.pivot->pivot_layer, "pivot_layer");
    Equal(decision.has_transition_layer(), oracle_.pivot->transition_layer.has_value(),
          "transition_layer");
    Equal(decision.transition_layer(), oracle_.pivot->transition_layer.value_or(0),
          "transition_layer");
    Equal(static_cast<int>(decision.mode()), static_cast<int>(oracle_.pivot->mode), "pivot mode");
    Equal(decision.decided_at_layer(), oracle_.pivot->decided_at, "decided_at_layer");
    Equal(decision.has_skeleton_from_layer(), oracle_.pivot->skeleton_from.has_value(),
          "skeleton_from_layer");
    Equal(decision.skeleton_from_layer(), oracle_.pivot->skeleton_from.value_or(0),
          "skeleton_from_layer");
    Equal(decision.profiled_prompts() > 0, decision.mode() == v1::PIVOT_MODE_PROFILED,
          "profiled_prompts");
    if (effective_.skeleton_layer) {
      Equal(decision.layers_size(), 1, "pivot layers");
      for (const v1::LayerMetrics& metrics : decision.layers()) {
        Metrics(metrics, *effective_.skeleton_layer, "pivot layer");
        Equal(metrics.has_transition(), false, "pivot layer has transition");
      }
    } else {
      Equal(decision.layers_size(), static_cast<int>(oracle_.pivot->transition.size()),
            "pivot layers");
    }
    if (!effective_.skeleton_layer &&
        decision.layers_size() == static_cast<int>(oracle_.pivot->transition.size())) {
      for (const v1::LayerMetrics& metrics : decision.layers()) {
        const std::string name = absl::StrCat("pivot layer ", metrics.layer());
        Metrics(metrics, metrics.layer(), name);
        Equal(metrics.has_transition(), metrics.layer() != 0, name + " has transition");
        // Differences of metrics, over their largest: their rounding is magnified.
        if (!(std::fabs(metrics.transition() - oracle_.pivot->transition[metrics.layer()]) <
              1e-2)) {
          faults_.push_back(absl::StrCat(name, " transition: ", metrics.transition(), ", want ",
                                         oracle_.pivot->transition[metrics.layer()]));
        }
      }
    }
    std::vector<double> ranked = oracle_.pivot->centrality;
    ranked.resize(ranked.size() - effective_.always);
    Positions(AsInts(Tensor(answer_.pivot->tensors, v1::TENSOR_SKELETON_POSITIONS)), ranked,
              data_.open().prompt_tokens(), effective_.skeleton, /*exact=*/false, "skeleton");
    if (!data_.open().return_centrality() || !effective_.structkv) return;
    const std::vector<float> got = AsFloats(Tensor(answer_.pivot->tensors, v1::TENSOR_CENTRALITY));
    Equal(got.size(), oracle_.pivot->centrality.size(), "centrality");
    for (size_t j = 0; j < std::min(got.size(), oracle_.pivot->centrality.size()); ++j) {
      Near(got[j], oracle_.pivot->centrality[j], absl::StrCat("centrality of token ", j));
    }
  }

  void Summary() {
    if (!answer_.summary) {
      faults_.emplace_back("no summary");
      return;
    }
    const v1::Summary& summary = *answer_.summary;
    uint64_t output = 0;
    for (const auto& [index, layer] : answer_.layers) {
      for (const auto& [tensor, bytes] : layer.tensors) output += bytes.size();
    }
    if (answer_.pivot) {
      for (const auto& [tensor, bytes] : answer_.pivot->tensors) output += bytes.size();
    }
    Equal(summary.layer_count(), data_.layers(), "summary.layer_count");
    Equal(summary.input_bytes(), data_.total_bytes(), "summary.input_bytes");
    Equal(summary.output_bytes(), output, "summary.output_bytes");
    Equal(summary.logical_length(), data_.open().prompt_tokens(), "summary.logical_length");
    Equal(summary.kv_length(), effective_.largest, "summary.kv_length");
    Equal(summary.next_position(),
          data_.open().has_rotary() ? effective_.largest : data_.open().prompt_tokens(),
          "summary.next_position");
    Equal(summary.transport(), "inline", "summary.transport");
    Equal(summary.kv_blocks(), Blocks(effective_.largest), "summary.kv_blocks");
    Equal(summary.values_in_keys(), data_.open().geometry().values_in_keys(),
          "summary.values_in_keys");
    if (answer_.opened) {
      Equal(summary.fingerprint(), answer_.opened->fingerprint(), "summary.fingerprint");
      Equal(summary.backend(), answer_.opened->backend(), "summary.backend");
    }
  }

  static std::string Tensor(const std::map<v1::Tensor, std::string>& tensors, v1::Tensor tensor) {
    const auto it = tensors.find(tensor);
    return it == tensors.end() ? std::string() : it->second;
  }

  const PromptData& data_;
  const Effective& effective_;
  const Answer& answer_;
  const Oracle oracle_;
  bool exact_ = false;
  std::vector<std::string> faults_;
};

}  // namespace

std::vector<std::string> CompareWithOracle(const PromptData& data, const Answer& answer) {
  return Comparison(data, answer).Run();
}

std::vector<std::string> CompareResultsWithOracle(const PromptData& data, const Answer& answer) {
  return Comparison(data, answer).RunResults();
}

}  // namespace structkv::testkit
