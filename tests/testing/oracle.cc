#include "tests/testing/oracle.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace structkv::testkit {
namespace {

// Scaled scores of one query head's window row: [row's last key + 1].
std::vector<double> RowScores(const PromptData& data, uint32_t layer, uint32_t head, uint32_t row) {
  const v1::ModelGeometry& geometry = data.open().geometry();
  const v1::DType dtype = data.open().dtype();
  const uint64_t tokens = data.tokens(layer);
  const uint64_t dim = geometry.key_dim();
  const uint64_t kv_head = head / (geometry.query_head_count() / geometry.kv_head_count());
  const uint64_t window = data.effective().window;
  const std::string& keys = data.tensor(layer, v1::TENSOR_KEYS);
  const std::string& queries = data.tensor(layer, v1::TENSOR_WINDOW_QUERIES);
  std::vector<double> query(dim);
  for (uint64_t i = 0; i < dim; ++i) {
    query[i] = ElementAt(data.effective().query_dtype, queries, (head * window + row) * dim + i);
  }
  double scale = data.open().has_attention_scale() ? data.open().attention_scale()
                                                   : 1 / std::sqrt(static_cast<double>(dim));
  const std::string& key_scales = data.tensor(layer, v1::TENSOR_KEY_SCALES);
  if (!key_scales.empty()) {
    scale *= ElementAt(v1::DTYPE_F32, key_scales, data.effective().scales == 1 ? 0 : kv_head);
  }
  std::vector<double> scores(tokens - window + row + 1);
  for (uint64_t token = 0; token < scores.size(); ++token) {
    const uint64_t start = data.RowIndex(layer, kv_head, token) * dim;
    double dot = 0;
    for (uint64_t i = 0; i < dim; ++i) dot += query[i] * ElementAt(dtype, keys, start + i);
    scores[token] = dot * scale;
  }
  return scores;
}

double LogSumExp(const std::vector<double>& scores) {
  const double top = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (double score : scores) sum += std::exp(score - top);
  return top + std::log(sum);
}

std::vector<std::vector<double>> Attention(const PromptData& data, uint32_t layer) {
  const v1::ModelGeometry& geometry = data.open().geometry();
  const uint32_t group = geometry.query_head_count() / geometry.kv_head_count();
  const uint32_t window = data.effective().window;
  std::vector<std::vector<double>> out(geometry.kv_head_count(),
                                       std::vector<double>(data.tokens(layer)));
  const v1::WindowReduce window_reduce = data.effective().window_reduce;
  const v1::GroupReduce reduce = data.effective().reduce;
  for (uint32_t head = 0; head < geometry.query_head_count(); ++head) {
    std::vector<double> of_head(data.tokens(layer));
    for (uint32_t row = 0; row < window; ++row) {
      const std::vector<double> scores = RowScores(data, layer, head, row);
      const double lse = LogSumExp(scores);
      for (size_t j = 0; j < scores.size(); ++j) {
        const double weight = std::exp(scores[j] - lse);
        if (window_reduce == v1::WINDOW_REDUCE_MAX) {
          of_head[j] = std::max(of_head[j], weight);
        } else {
          of_head[j] += window_reduce == v1::WINDOW_REDUCE_MEAN ? weight / window : weight;
        }
      }
    }
    std::vector<double>& to = out[head / group];
    for (size_t j = 0; j < of_head.size(); ++j) {
      if (reduce == v1::GROUP_REDUCE_MAX) {
        to[j] = std::max(to[j], of_head[j]);
      } else {
        to[j] += reduce == v1::GROUP_REDUCE_MEAN ? of_head[j] / group : of_head[j];
      }
    }
  }
  return out;
}

std::vector<std::vector<double>> Given(const PromptData& data, uint32_t layer) {
  const std::string& bytes = data.tensor(layer, v1::TENSOR_SALIENCY);
  const size_t tokens = data.tokens(layer);
  std::vector<std::vector<double>> out(bytes.size() / 4 / tokens, std::vector<double>(tokens));
  for (size_t i = 0; i < out.size() * tokens; ++i) {
    out[i / tokens][i % tokens] = ElementAt(v1::DTYPE_F32, bytes, i);
  }
  return out;
}

// Of the tokens before those that are kept anyway.
std::vector<double> Pooled(const std::vector<double>& in, const Effective& effective) {
  const auto tokens = static_cast<int64_t>(in.size()) - effective.always;
  const int64_t half = effective.kernel / 2;
  std::vector<double> out(in.begin(), in.begin() + tokens);
  if (effective.pooling == v1::POOLING_NONE) return out;
  for (int64_t j = 0; j < tokens; ++j) {
    double sum = 0;
    double top = 0;
    for (int64_t k = std::max<int64_t>(0, j - half); k <= std::min(tokens - 1, j + half); ++k) {
      sum += in[k];
      top = std::max(top, in[k]);
    }
    out[j] = effective.pooling == v1::POOLING_AVG ? sum / effective.kernel : top;
  }
  return out;
}

void SetMetrics(double sparsity_ratio, OracleLayer* layer) {
  const std::vector<double>& s = layer->saliency;
  const auto tokens = static_cast<double>(s.size());
  const double total = std::accumulate(s.begin(), s.end(), 0.0);
  std::vector<double> p = s;
  for (double& value : p) value /= total;
  for (double value : p) {
    if (value > 0) layer->entropy -= value * std::log(value);
    layer->variance += (tokens * value - 1) * (tokens * value - 1) / tokens;
  }
  std::sort(p.begin(), p.end(), std::greater<>());
  const auto top = static_cast<ptrdiff_t>(std::ceil(sparsity_ratio * tokens - 1e-9));
  // All of it is 1, without a rounding that a gradient could be made of.
  layer->sparsity = top == std::ssize(p) ? 1 : std::accumulate(p.begin(), p.begin() + top, 0.0);
}

// The gradient of x at each layer, over its largest magnitude.
std::vector<double> Gradient(const std::vector<double>& x) {
  std::vector<double> d(x.size());
  double top = 0;
  for (size_t l = 1; l < x.size(); ++l) {
    d[l] = x[l] - x[l - 1];
    top = std::max(top, std::fabs(d[l]));
  }
  for (double& value : d) value = top > 0 ? value / top : 0;
  return d;
}

// T of the first `seen` layers, normalised over these.
std::vector<double> Transitions(const v1::Pivot& pivot, const std::vector<OracleLayer>& layers,
                                int64_t seen) {
  std::vector<double> entropy;
  std::vector<double> sparsity;
  std::vector<double> variance;
  for (int64_t l = 0; l < seen; ++l) {
    entropy.push_back(-layers[l].entropy);
    sparsity.push_back(layers[l].sparsity);
    variance.push_back(layers[l].variance);
  }
  entropy = Gradient(entropy);
  sparsity = Gradient(sparsity);
  variance = Gradient(variance);
  std::vector<double> transition(seen);
  for (int64_t l = 1; l < seen; ++l) {
    transition[l] = (pivot.has_entropy_weight() ? pivot.entropy_weight() : 0.2) * entropy[l] +
                    (pivot.has_sparsity_weight() ? pivot.sparsity_weight() : 0.3) * sparsity[l] +
                    (pivot.has_variance_weight() ? pivot.variance_weight() : 0.5) * variance[l];
  }
  return transition;
}

OraclePivot FindPivot(const PromptData& data, const std::vector<OracleLayer>& layers) {
  const v1::StructKvMethod& method = data.open().method().structkv();
  const v1::Pivot& pivot = method.pivot();
  const auto count = static_cast<int64_t>(layers.size());
  const double depth = static_cast<double>(count);
  const double end = pivot.has_search_end() ? pivot.search_end() : 0.75;
  const auto first = std::max<int64_t>(
      1, static_cast<int64_t>(
             std::ceil((pivot.has_search_begin() ? pivot.search_begin() : 0.25) * depth)));
  const auto last = std::min(count - 2, static_cast<int64_t>(std::floor(end * depth)));
  OraclePivot result;
  result.mode = pivot.mode() == v1::PIVOT_MODE_UNSPECIFIED ? v1::PIVOT_MODE_EXACT : pivot.mode();
  std::optional<uint32_t> given;
  if (pivot.mode() == v1::PIVOT_MODE_FIXED) given = pivot.fixed_layer();
  if (pivot.mode() == v1::PIVOT_MODE_PROFILED) {
    given = data.profiled_layer;
    if (!given) result.mode = v1::PIVOT_MODE_ONLINE;
  }
  const bool online = result.mode == v1::PIVOT_MODE_ONLINE;
  // The best layer after `seen` layers; nullopt where there is none to choose from.
  const auto best = [&](int64_t seen) {
    std::optional<uint32_t> top;
    for (int64_t l = first; l <= std::min(last, seen - 1); ++l) {
      if (!top || result.transition[l] > result.transition[*top]) top = static_cast<uint32_t>(l);
    }
    return top;
  };
  uint32_t summed = 0;  // the layer of the skeleton's centrality
  if (given) {
    result.pivot_layer = result.decided_at = summed = *given;
    result.transition = Transitions(pivot, layers, *given + 1);
  } else {
    const int64_t deadline = std::clamp<int64_t>(
        static_cast<int64_t>(std::floor((pivot.has_deadline() ? pivot.deadline() : end) * depth)),
        first, count - 1);
    const int64_t patience = pivot.has_patience() ? pivot.patience() : 2;
    double needed = (pivot.has_entropy_weight() ? pivot.entropy_weight() : 0.2) +
                    (pivot.has_sparsity_weight() ? pivot.sparsity_weight() : 0.3) +
                    (pivot.has_variance_weight() ? pivot.variance_weight() : 0.5);
    needed *= pivot.has_confirm_score() ? pivot.confirm_score() : 0.5;
    for (int64_t seen = 1; seen <= count; ++seen) {
      result.decided_at = static_cast<uint32_t>(seen - 1);
      result.transition = Transitions(pivot, layers, seen);
      result.transition_layer = best(seen);
      if (!online || first > last || !result.transition_layer) continue;
      const double score = result.transition[*result.transition_layer];
      const bool confirmed =
          score > 0 && score >= needed && seen - 1 - *result.transition_layer >= patience;
      if (confirmed || seen - 1 >= deadline) break;
    }
    result.pivot_layer =
        result.transition_layer ? *result.transition_layer + 1 : static_cast<uint32_t>(count - 1);
    summed = online ? result.decided_at : result.pivot_layer;
  }
  const uint32_t from = std::max(result.pivot_layer, result.decided_at) + 1;
  if (from < count) result.skeleton_from = from;
  const double decay = method.has_decay() ? method.decay() : 0.9;
  result.centrality.assign(data.open().prompt_tokens(), 0);
  for (uint32_t l = 0; l <= summed; ++l) {
    for (size_t j = 0; j < result.centrality.size(); ++j) {
      result.centrality[j] = decay * result.centrality[j] + layers[l].saliency[j];
    }
  }
  return result;
}

// What the method's one layer makes of its scores: their sum over the heads, smoothed.
OraclePivot PivotOfLayer(const PromptData& data, const std::vector<OracleLayer>& layers) {
  OraclePivot result;
  result.pivot_layer = result.decided_at = *data.effective().skeleton_layer;
  result.mode = v1::PIVOT_MODE_FIXED;
  // FastKV's worker may cut what follows; GemFilter's begins again.
  if (data.effective().fastkv && result.pivot_layer + 1 < data.layers()) {
    result.skeleton_from = result.pivot_layer + 1;
  }
  const OracleLayer& layer = layers[result.pivot_layer];
  result.centrality.assign(data.open().prompt_tokens(), 0);
  // FastKV smooths each head, GemFilter their sum.
  const auto heads =
      data.effective().fastkv ? layer.per_head : std::vector<std::vector<double>>{layer.saliency};
  for (const auto& head : heads) {
    const std::vector<double> scores = Pooled(head, data.effective());
    for (size_t j = 0; j < scores.size(); ++j) result.centrality[j] += scores[j];
  }
  return result;
}

}  // namespace

std::vector<float> WindowLse(const PromptData& data, uint32_t layer) {
  std::vector<float> out;
  for (uint32_t head = 0; head < data.open().geometry().query_head_count(); ++head) {
    for (uint32_t row = 0; row < data.effective().window; ++row) {
      out.push_back(static_cast<float>(LogSumExp(RowScores(data, layer, head, row))));
    }
  }
  return out;
}

Oracle::Oracle(const PromptData& data) {
  const Effective& effective = data.effective();
  if (effective.statistic == v1::STATISTIC_NONE) return;
  const v1::Pivot& parameters = data.open().method().structkv().pivot();
  for (uint32_t l = 0; l < data.layers(); ++l) {
    if (effective.layers[l] == 0) {
      layers.emplace_back();
      continue;
    }
    OracleLayer layer;
    layer.per_head =
        effective.statistic == v1::STATISTIC_WINDOW_QUERIES ? Attention(data, l) : Given(data, l);
    layer.saliency.assign(data.tokens(l), 0);
    for (const auto& head : layer.per_head) {
      for (size_t j = 0; j < head.size(); ++j) layer.saliency[j] += head[j];
    }
    if (effective.per_head) {
      for (const auto& head : layer.per_head) layer.ranked.push_back(Pooled(head, effective));
    } else {
      layer.ranked.push_back(Pooled(layer.saliency, effective));
    }
    SetMetrics(parameters.has_sparsity_ratio() ? parameters.sparsity_ratio() : 0.1, &layer);
    layers.push_back(std::move(layer));
  }
  if (effective.structkv) pivot = FindPivot(data, layers);
  if (effective.skeleton_layer) pivot = PivotOfLayer(data, layers);
}

}  // namespace structkv::testkit
