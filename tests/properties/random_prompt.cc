#include "tests/properties/random_prompt.h"

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <string>
#include <utility>

#include "tests/testing/oracle.h"

namespace structkv::testkit {
namespace {

// Multiply-adds of a prompt's scores, at most: the reference needs some nanoseconds for each.
constexpr uint64_t kMaxWork = 4'000'000;

template <typename T>
T Pick(Random* random, std::initializer_list<T> of) {
  return *std::next(of.begin(), random->Between(0, static_cast<int64_t>(of.size()) - 1));
}

double RandomRatio(Random* random) {
  if (random->Chance(70)) return Pick(random, {0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 1.0});
  return static_cast<double>(random->Between(1, 1000)) / 1000;
}

void SetBudget(Random* random, bool window, bool kvpress, v1::Budget* budget) {
  if (random->Chance(80)) budget->set_ratio(RandomRatio(random));
  switch (random->Between(0, 3)) {
    case 0:
      if (window) budget->set_kind(v1::BUDGET_KIND_WINDOW_ON_TOP);
      break;
    case 1:
      if (kvpress) budget->set_kind(v1::BUDGET_KIND_KVPRESS);
      break;
    default:
      break;
  }
}

// What the methods with an observation window share.
template <typename Kind>
void SetScoring(Random* random, v1::Statistic statistic, Kind* kind) {
  if (random->Chance(70)) kind->set_window_tokens(Pick(random, {1U, 2U, 5U, 8U, 16U, 31U, 64U}));
  if (random->Chance(60)) {
    kind->set_pooling(Pick(random, {v1::POOLING_NONE, v1::POOLING_AVG, v1::POOLING_MAX}));
  }
  if (kind->pooling() != v1::POOLING_NONE && kind->pooling() != v1::POOLING_UNSPECIFIED &&
      random->Chance(60)) {
    kind->set_pooling_kernel(Pick(random, {1U, 3U, 5U, 9U, 63U}));
  }
  if (statistic == v1::STATISTIC_WINDOW_QUERIES && random->Chance(40)) {
    kind->set_window_reduce(
        Pick(random, {v1::WINDOW_REDUCE_MEAN, v1::WINDOW_REDUCE_SUM, v1::WINDOW_REDUCE_MAX}));
  }
  if (statistic == v1::STATISTIC_WINDOW_QUERIES && random->Chance(40)) {
    kind->set_group_reduce(
        Pick(random, {v1::GROUP_REDUCE_SUM, v1::GROUP_REDUCE_MEAN, v1::GROUP_REDUCE_MAX}));
  }
}

// One vector for several heads can be selected from for all of them alone.
template <typename Kind>
void SetGranularity(Random* random, bool one_vector, Kind* kind) {
  if (one_vector) {
    kind->set_granularity(v1::GRANULARITY_PER_LAYER);
  } else if (random->Chance(60)) {
    kind->set_granularity(Pick(random, {v1::GRANULARITY_PER_LAYER, v1::GRANULARITY_PER_KV_HEAD}));
  }
}

void SetPivot(Random* random, uint32_t layers, v1::Pivot* pivot) {
  switch (random->Between(0, 3)) {
    case 0:
      pivot->set_mode(v1::PIVOT_MODE_FIXED);
      pivot->set_fixed_layer(static_cast<uint32_t>(random->Between(0, layers - 1)));
      break;
    case 1:
      pivot->set_mode(Pick(random, {v1::PIVOT_MODE_ONLINE, v1::PIVOT_MODE_PROFILED}));
      if (random->Chance(50)) pivot->set_patience(static_cast<uint32_t>(random->Between(1, 4)));
      if (random->Chance(50)) pivot->set_confirm_score(Pick(random, {0.0, 0.3, 1.0}));
      if (random->Chance(30)) pivot->set_deadline(Pick(random, {0.25, 0.5, 1.0}));
      break;
    default:
      if (random->Chance(50)) pivot->set_mode(v1::PIVOT_MODE_EXACT);
      break;
  }
  if (random->Chance(30)) pivot->set_sparsity_ratio(RandomRatio(random));
}

void SetStructKv(Random* random, bool one_vector, v1::Open* open) {
  v1::StructKvMethod* method = open->mutable_method()->mutable_structkv();
  SetScoring(random, open->statistic(), method);
  SetBudget(random, /*window=*/true, /*kvpress=*/true, method->mutable_kv_budget());
  SetGranularity(random, one_vector, method);
  if (random->Chance(50)) method->set_decay(Pick(random, {0.0, 0.5, 0.95, 1.0}));
  if (random->Chance(60)) SetBudget(random, true, true, method->mutable_skeleton_budget());
  SetPivot(random, open->geometry().layer_count(), method->mutable_pivot());
  open->set_return_centrality(random->Chance(50));
}

void SetMethod(Random* random, v1::Open* open) {
  const uint32_t layers = open->geometry().layer_count();
  const auto layer = static_cast<uint32_t>(random->Between(0, layers - 1));
  const bool one_vector =
      open->statistic() == v1::STATISTIC_SALIENCY && open->geometry().kv_head_count() > 1;
  v1::Method* method = open->mutable_method();
  const auto scoring = [&](auto* kind, bool kvpress) {
    SetScoring(random, open->statistic(), kind);
    SetBudget(random, /*window=*/true, kvpress, kind->mutable_kv_budget());
  };
  switch (random->Between(0, 9)) {
    case 0:
      scoring(method->mutable_snapkv(), true);
      SetGranularity(random, one_vector, method->mutable_snapkv());
      break;
    case 1:
      // The pyramid of kvpress is another one, which kvpress's own vectors hold.
      scoring(method->mutable_pyramidkv(), false);
      SetGranularity(random, one_vector, method->mutable_pyramidkv());
      if (random->Chance(50)) method->mutable_pyramidkv()->set_beta(Pick(random, {1.0, 2.5, 50.0}));
      break;
    case 2:
      if (one_vector) return SetStructKv(random, one_vector, open);
      scoring(method->mutable_fastkv(), true);
      SetGranularity(random, one_vector, method->mutable_fastkv());
      method->mutable_fastkv()->set_tsp_layer(layer);
      if (random->Chance(60)) {
        SetBudget(random, true, true, method->mutable_fastkv()->mutable_skeleton_budget());
      }
      break;
    case 3:
      scoring(method->mutable_gemfilter(), true);
      method->mutable_gemfilter()->set_filter_layer(layer);
      open->set_output(v1::OUTPUT_PLAN);
      break;
    case 4:
      if (open->statistic() == v1::STATISTIC_WINDOW_QUERIES) {
        open->set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
      }
      SetBudget(random, false, true, method->mutable_h2o()->mutable_kv_budget());
      SetGranularity(random, one_vector, method->mutable_h2o());
      if (random->Chance(50)) {
        method->mutable_h2o()->set_recent_share(Pick(random, {0.0, 0.3, 0.75, 1.0}));
      }
      break;
    case 5:
      open->set_statistic(v1::STATISTIC_NONE);
      SetBudget(random, false, true, method->mutable_streaming_llm()->mutable_kv_budget());
      if (random->Chance(50)) {
        method->mutable_streaming_llm()->set_sink_tokens(Pick(random, {0U, 1U, 4U, 50U}));
      }
      break;
    case 6:
      open->set_statistic(v1::STATISTIC_NONE);
      method->mutable_full();
      break;
    default:
      SetStructKv(random, one_vector, open);
      break;
  }
}

// fp8, with scales or without.
void SetElements(Random* random, v1::Open* open) {
  open->set_dtype(Pick(random, {v1::DTYPE_F32, v1::DTYPE_F16, v1::DTYPE_BF16, v1::DTYPE_F8_E4M3,
                                v1::DTYPE_F8_E5M2}));
  if (ElementBytes(open->dtype()) > 1) return;
  open->set_kv_scales(
      Pick(random, {v1::KV_SCALES_NONE, v1::KV_SCALES_PER_TENSOR, v1::KV_SCALES_PER_KV_HEAD}));
  if (random->Chance(50)) {
    open->set_query_dtype(Pick(random, {v1::DTYPE_F32, v1::DTYPE_F16, v1::DTYPE_BF16}));
  }
}

// Values of their own size, or the beginning of the keys.
void SetValues(Random* random, v1::ModelGeometry* geometry) {
  if (random->Chance(20)) {
    geometry->set_values_in_keys(true);
    geometry->set_value_dim(
        static_cast<uint32_t>(32 + 8 * random->Between(0, (geometry->key_dim() - 32) / 8)));
  } else if (random->Chance(40)) {
    geometry->set_value_dim(Pick(random, {32U, 64U, 72U, 128U}));
  }
}

uint64_t Work(const v1::Open& open) {
  if (Effective(open).statistic != v1::STATISTIC_WINDOW_QUERIES) return 0;
  const v1::ModelGeometry& geometry = open.geometry();
  return uint64_t{geometry.layer_count()} * geometry.query_head_count() * geometry.key_dim() *
         open.prompt_tokens() * Effective(open).window;
}

}  // namespace

v1::Open RandomOpen(Random* random) {
  v1::Open open;
  do {
    open = SmallOpen();
    // A model of its own, of which no profile knows anything.
    open.set_model_id("model " + std::to_string(random->Next()));
    v1::ModelGeometry* geometry = open.mutable_geometry();
    const auto heads = Pick(random, {1U, 1U, 2U, 3U, 4U, 8U});
    geometry->set_layer_count(static_cast<uint32_t>(random->Between(1, 8)));
    geometry->set_kv_head_count(heads);
    geometry->set_query_head_count(heads * Pick(random, {1U, 1U, 2U, 3U, 4U, 7U, 8U}));
    geometry->set_key_dim(Pick(random, {32U, 32U, 40U, 64U, 96U, 128U}));
    SetValues(random, geometry);
    open.set_prompt_tokens(static_cast<uint32_t>(random->Chance(25) ? random->Between(1, 20)
                                                 : random->Chance(90)
                                                     ? random->Between(20, 300)
                                                     : random->Between(300, 3000)));
    SetElements(random, &open);
    open.set_layout(Pick(random, {v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM}));
    if (random->Chance(30)) RandomBlocks(random, &open);
    open.set_statistic(Pick(random, {v1::STATISTIC_WINDOW_QUERIES, v1::STATISTIC_WINDOW_QUERIES,
                                     v1::STATISTIC_SALIENCY, v1::STATISTIC_SALIENCY_PER_KV_HEAD}));
    if (random->Chance(25)) open.set_output(v1::OUTPUT_PLAN);
    SetMethod(random, &open);
    open.set_window_lse(open.statistic() == v1::STATISTIC_WINDOW_QUERIES && random->Chance(25));
    open.set_return_saliency(open.statistic() != v1::STATISTIC_NONE);
  } while (Work(open) > kMaxWork);
  return open;
}

v1::Budget* MutableBudget(v1::Method* method) {
  switch (method->kind_case()) {
    case v1::Method::kStructkv:
    case v1::Method::KIND_NOT_SET:
      return method->mutable_structkv()->mutable_kv_budget();
    case v1::Method::kSnapkv:
      return method->mutable_snapkv()->mutable_kv_budget();
    case v1::Method::kStreamingLlm:
      return method->mutable_streaming_llm()->mutable_kv_budget();
    case v1::Method::kFull:
      return nullptr;
    case v1::Method::kPyramidkv:
      return method->mutable_pyramidkv()->mutable_kv_budget();
    case v1::Method::kFastkv:
      return method->mutable_fastkv()->mutable_kv_budget();
    case v1::Method::kGemfilter:
      return method->mutable_gemfilter()->mutable_kv_budget();
    case v1::Method::kH2O:
      return method->mutable_h2o()->mutable_kv_budget();
  }
  return nullptr;
}

void RandomBlocks(Random* random, v1::Open* open) {
  PageAtRandom(Pick(random, {16U, 16U, 32U, 48U, 128U, 256U}),
               static_cast<uint32_t>(random->Between(0, 3)), random->Next(), open);
}

void AddTies(PromptData* data, Random* random) {
  const v1::Open& open = data->open();
  const int64_t before = int64_t{open.prompt_tokens()} - data->effective().always;
  if (before < 2) return;
  const bool queries = data->effective().statistic == v1::STATISTIC_WINDOW_QUERIES;
  const uint64_t tokens = open.prompt_tokens();
  const uint64_t rows =
      data->effective().statistic == v1::STATISTIC_SALIENCY ? 1 : open.geometry().kv_head_count();
  const uint64_t row_bytes =
      queries ? open.geometry().key_dim() * ElementBytes(open.dtype()) : sizeof(float);
  for (uint32_t layer = 0; layer < data->layers(); ++layer) {
    std::string* bytes =
        data->mutable_tensor(layer, queries ? v1::TENSOR_KEYS : v1::TENSOR_SALIENCY);
    if (bytes->empty()) continue;
    const auto at = [&](uint64_t row, uint64_t token) {
      return (queries ? data->RowIndex(layer, row, token) : row * tokens + token) * row_bytes;
    };
    for (int64_t i = 0; i < before; ++i) {
      const auto from = static_cast<uint64_t>(random->Between(0, std::min<int64_t>(before, 9) - 1));
      const auto to = static_cast<uint64_t>(random->Between(0, before - 1));
      for (uint64_t row = 0; row < rows; ++row) {
        const std::string copy = bytes->substr(at(row, from), row_bytes);
        bytes->replace(at(row, to), row_bytes, copy);
      }
    }
    std::string* lse = data->mutable_tensor(layer, v1::TENSOR_WINDOW_LSE);
    if (lse->empty()) continue;
    lse->clear();
    for (const float value : WindowLse(*data, layer)) AppendElement(v1::DTYPE_F32, value, lse);
  }
}

PromptData Rearranged(const PromptData& data, const v1::Open& open) {
  PromptData other(open, 0);
  const uint64_t heads = open.geometry().kv_head_count();
  const uint64_t tokens = open.prompt_tokens();
  for (uint32_t layer = 0; layer < data.layers(); ++layer) {
    for (const v1::Tensor tensor : data.effective().tensors) {
      const std::string& from = data.tensor(layer, tensor);
      std::string* to = other.mutable_tensor(layer, tensor);
      if (tensor != v1::TENSOR_KEYS && tensor != v1::TENSOR_VALUES) {
        *to = from;
        continue;
      }
      if (from.empty()) continue;
      const uint64_t row =
          ElementBytes(open.dtype()) *
          (tensor == v1::TENSOR_KEYS ? open.geometry().key_dim() : data.effective().value_dim);
      for (uint64_t head = 0; head < heads; ++head) {
        for (uint64_t token = 0; token < tokens; ++token) {
          to->replace(other.RowIndex(layer, head, token) * row, row, from,
                      data.RowIndex(layer, head, token) * row, row);
        }
      }
    }
  }
  return other;
}

Answer Rearranged(const Answer& answer, const v1::Open& from, const v1::Open& to) {
  Answer other = answer;
  const uint64_t heads = from.geometry().kv_head_count();
  for (auto& [index, layer] : other.layers) {
    const uint64_t kept = layer.kept_tokens;
    for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
      const auto found = layer.tensors.find(tensor);
      if (found == layer.tensors.end()) continue;
      const std::string old = std::move(found->second);
      const uint64_t row = old.size() / OutputRows(from, kept);
      found->second.assign(OutputRows(to, kept) * row, '\0');
      for (uint64_t head = 0; head < heads; ++head) {
        for (uint64_t i = 0; i < kept; ++i) {
          found->second.replace(OutputRowIndex(to, kept, head, i) * row, row, old,
                                OutputRowIndex(from, kept, head, i) * row, row);
        }
      }
    }
  }
  return other;
}

}  // namespace structkv::testkit
