// What must hold of every prompt's answer, whatever its numbers: random prompts through the engine,
// on every backend. STRUCTKV_TEST_SEED sets the seed, which is printed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "service/engine/prompt.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/random_tensor.h"
#include "tests/properties/random_prompt.h"
#include "tests/testing/engine_answer.h"

namespace structkv::testkit {
namespace {

using ::testing::IsEmpty;
using Sets = std::vector<std::vector<int32_t>>;  // of one layer: one, or one for each KV head

constexpr uint64_t kPrompts = 60;

// The rows of a tensor of 4-byte elements.
template <typename T>
std::vector<std::vector<T>> RowsOf(const std::vector<T>& values, size_t rows) {
  std::vector<std::vector<T>> out;
  const size_t size = rows == 0 ? 0 : values.size() / rows;
  for (size_t row = 0; row < rows; ++row) {
    out.emplace_back(values.begin() + static_cast<ptrdiff_t>(row * size),
                     values.begin() + static_cast<ptrdiff_t>((row + 1) * size));
  }
  return out;
}

// Shapes and types of a full layer's saliency call.
SaliencyParams ShapesOf(const engine::PromptSpec& spec) {
  const auto& geometry = spec.geometry;
  SaliencyParams params;
  params.queries = TensorView::Dense(nullptr, spec.queries(), Layout::kHeadTokenDim,
                                     geometry.query_heads, spec.window_rows(), geometry.key_dim);
  params.keys = TensorView::Dense(nullptr, spec.dtype, spec.layout, geometry.kv_heads,
                                  spec.prompt_tokens, geometry.key_dim);
  return params;
}

class SelectionPropertiesTest : public ::testing::TestWithParam<std::string> {
 protected:
  // Calls check(data, answer) for random prompts, some of whose layers are skeleton rows.
  template <typename Check>
  void ForEachPrompt(uint64_t number, bool ties, Check check) {
    for (uint64_t i = 0; i < kPrompts && !HasFailure(); ++i) {
      const uint64_t seed = structkv::testing::Seed() + 1000 * number + i;
      Random random(seed);
      PromptData data(RandomOpen(&random), seed);
      if (ties) AddTies(&data, &random);
      SCOPED_TRACE(absl::StrCat("seed ", seed, ": ", data.open().ShortDebugString()));
      const std::optional<Answer> answer = Compress(&data, random.Chance(50));
      if (!answer.has_value()) return;
      check(data, *answer);
    }
  }

  // Layers in order; with `cut` those that may are skeleton rows.
  std::optional<Answer> Compress(PromptData* data, bool cut) {
    engine::Prompt prompt(SpecOf(data->open()), backend_.get(), &pool_);
    Answer answer;
    for (uint32_t layer = 0; layer < data->layers(); ++layer) {
      const auto skeleton = prompt.skeleton();
      if (cut && skeleton != nullptr && skeleton->from_layer.has_value() &&
          layer >= *skeleton->from_layer) {
        data->KeepRows(layer, skeleton->positions);
      }
      const absl::StatusOr<engine::LayerOutput> output =
          prompt.CompressLayer(InputOf(*data, layer, &pool_), SerialFor);
      EXPECT_TRUE(output.ok()) << output.status();
      if (!output.ok()) return std::nullopt;
      AddLayer(*output, &answer);
      if (const auto pivot = prompt.TakePivot()) AddPivot(*pivot, &answer);
    }
    EXPECT_TRUE(prompt.done());
    return answer;
  }

  static size_t SetsOf(const PromptData& data) {
    return data.effective().per_head ? data.open().geometry().kv_head_count() : 1;
  }
  static Sets Kept(const PromptData& data, const Answer& answer, uint32_t layer) {
    const LayerAnswer& each = answer.layers.at(layer);
    if (each.kept_tokens == 0) return {};
    return RowsOf(AsInts(each.tensors.at(v1::TENSOR_POSITIONS)), SetsOf(data));
  }
  static std::vector<int32_t> Skeleton(const Answer& answer) {
    if (!answer.pivot.has_value()) return {};
    return AsInts(answer.pivot->tensors.at(v1::TENSOR_SKELETON_POSITIONS));
  }
  static std::vector<std::vector<float>> Saliency(const PromptData& data, const Answer& answer,
                                                  uint32_t layer) {
    const auto& tensors = answer.layers.at(layer).tensors;
    const auto found = tensors.find(v1::TENSOR_SALIENCY);
    if (found == tensors.end()) return {};
    return RowsOf(AsFloats(found->second), SetsOf(data));
  }

  const std::unique_ptr<Backend> backend_ = structkv::testing::MakeBackend(GetParam());
  engine::BufferPool pool_{size_t{16} << 20};
};

INSTANTIATE_TEST_SUITE_P(, SelectionPropertiesTest,
                         ::testing::ValuesIn(structkv::testing::BackendsUnderTest()),
                         [](const auto& each) { return each.param; });

TEST_P(SelectionPropertiesTest, AnswersAreTheOracles) {
  ForEachPrompt(0, /*ties=*/false, [](const PromptData& data, const Answer& answer) {
    EXPECT_THAT(CompareResultsWithOracle(data, answer), IsEmpty());
  });
}

// Each query head hands out 1 to the tokens that its row sees.
TEST_P(SelectionPropertiesTest, SaliencySumsToTheQueryHeads) {
  int checked = 0;
  ForEachPrompt(1, false, [&](const PromptData& data, const Answer& answer) {
    if (data.effective().statistic != v1::STATISTIC_WINDOW_QUERIES) return;
    const v1::ModelGeometry& geometry = data.open().geometry();
    const double group = geometry.query_head_count() / geometry.kv_head_count();
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      for (const std::vector<float>& row : Saliency(data, answer, layer)) {
        const double sum = std::accumulate(row.begin(), row.end(), 0.0);
        const Effective& effective = data.effective();
        double most = effective.per_head ? group : geometry.query_head_count();
        double least = most;
        if (effective.window_reduce == v1::WINDOW_REDUCE_SUM)
          least = most = most * effective.window;
        // The largest of the rows: their mean at least.
        if (effective.window_reduce == v1::WINDOW_REDUCE_MAX) most *= effective.window;
        if (effective.reduce == v1::GROUP_REDUCE_MEAN) {
          least /= group;
          most /= group;
        }
        // The largest of a group's heads: one head's at least.
        if (effective.reduce == v1::GROUP_REDUCE_MAX) least /= group;
        EXPECT_GE(sum, least * (1 - 1e-4)) << "layer " << layer;
        EXPECT_LE(sum, most * (1 + 1e-4)) << "layer " << layer;
        ++checked;
      }
    }
  });
  EXPECT_GT(checked, 20);
}

TEST_P(SelectionPropertiesTest, BudgetsAreExact) {
  ForEachPrompt(2, true, [&](const PromptData& data, const Answer& answer) {
    const Effective& effective = data.effective();
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      const uint32_t kept = std::min(effective.layers[layer], data.tokens(layer));
      EXPECT_EQ(answer.layers.at(layer).kept_tokens, kept) << "layer " << layer;
      for (const std::vector<int32_t>& set : Kept(data, answer, layer)) {
        EXPECT_EQ(set.size(), kept) << "layer " << layer;
      }
    }
    EXPECT_EQ(Skeleton(answer).size(), effective.skeleton);
  });
}

TEST_P(SelectionPropertiesTest, PositionsAscendAndAreUnique) {
  const auto ascend = [](const std::vector<int32_t>& set, uint32_t tokens) {
    if (set.empty()) return;
    EXPECT_TRUE(std::is_sorted(set.begin(), set.end(), std::less_equal<>()));
    EXPECT_GE(set.front(), 0);
    EXPECT_LT(set.back(), static_cast<int32_t>(tokens));
  };
  ForEachPrompt(3, true, [&](const PromptData& data, const Answer& answer) {
    const std::vector<int32_t> skeleton = Skeleton(answer);
    ascend(skeleton, data.open().prompt_tokens());
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      for (const std::vector<int32_t>& set : Kept(data, answer, layer)) {
        ascend(set, data.open().prompt_tokens());
        if (data.rows(layer).empty()) continue;
        EXPECT_TRUE(std::includes(skeleton.begin(), skeleton.end(), set.begin(), set.end()))
            << "layer " << layer << " of skeleton rows keeps others";
      }
    }
  });
}

TEST_P(SelectionPropertiesTest, TheWindowIsKept) {
  ForEachPrompt(4, true, [&](const PromptData& data, const Answer& answer) {
    const uint32_t tokens = data.open().prompt_tokens();
    std::vector<int32_t> always(data.effective().always);
    std::iota(always.begin(), always.end(), static_cast<int32_t>(tokens - always.size()));
    const auto keeps = [&](const std::vector<int32_t>& set) {
      return std::includes(set.begin(), set.end(), always.begin(), always.end());
    };
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      for (const std::vector<int32_t>& set : Kept(data, answer, layer)) {
        EXPECT_TRUE(keeps(set)) << "layer " << layer;
        if (!data.effective().streaming) continue;
        std::vector<int32_t> sinks(data.effective().sinks);
        std::iota(sinks.begin(), sinks.end(), 0);
        EXPECT_TRUE(std::includes(set.begin(), set.end(), sinks.begin(), sinks.end()));
        // And the latest, up to the budget.
        EXPECT_EQ(set.back() == static_cast<int32_t>(tokens - 1),
                  set.size() > sinks.size() || sinks.size() == tokens);
      }
    }
    if (answer.pivot.has_value()) {
      EXPECT_TRUE(keeps(Skeleton(answer)));
    }
  });
}

// Whoever keeps more keeps what was kept before.
TEST_P(SelectionPropertiesTest, MoreOfTheTokensHoldThoseOfLess) {
  int grown = 0;
  ForEachPrompt(5, true, [&](const PromptData& data, const Answer& less) {
    v1::Open open = data.open();
    v1::Budget* budget = MutableBudget(open.mutable_method());
    if (budget == nullptr) return;
    Random random(data.layers() * 1000 + open.prompt_tokens());
    const double ratio = budget->has_ratio() ? budget->ratio() : 0.10;
    budget->set_ratio(ratio + (1 - ratio) * static_cast<double>(random.Between(0, 100)) / 100);
    PromptData same(open, 0);
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      if (!data.rows(layer).empty()) return;  // the other skeleton is another set of rows
      for (const v1::Tensor tensor : data.effective().tensors) {
        *same.mutable_tensor(layer, tensor) = data.tensor(layer, tensor);
      }
    }
    const std::optional<Answer> more = Compress(&same, /*cut=*/false);
    ASSERT_TRUE(more.has_value());
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      const Sets few = Kept(data, less, layer);
      const Sets many = Kept(same, *more, layer);
      ASSERT_EQ(few.size(), many.size());
      for (size_t set = 0; set < few.size(); ++set) {
        // A pyramid's layers take turns with what is left over.
        if (data.effective().pyramidkv && few[set].size() > many[set].size()) continue;
        EXPECT_TRUE(
            std::includes(many[set].begin(), many[set].end(), few[set].begin(), few[set].end()))
            << "layer " << layer << ", set " << set;
        grown += many[set].size() > few[set].size() ? 1 : 0;
      }
    }
  });
  EXPECT_GT(grown, 20);
}

// Of tokens with the same score the lower ones are kept.
TEST_P(SelectionPropertiesTest, TiesGoToTheLowerPosition) {
  int ties = 0;
  ForEachPrompt(6, true, [&](const PromptData& data, const Answer& answer) {
    const Effective& effective = data.effective();
    if (effective.statistic == v1::STATISTIC_NONE || effective.pooling != v1::POOLING_NONE) return;
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      const Sets kept = Kept(data, answer, layer);
      const std::vector<std::vector<float>> saliency = Saliency(data, answer, layer);
      ASSERT_EQ(saliency.size(), kept.size());
      for (size_t set = 0; set < kept.size(); ++set) {
        const std::vector<int32_t>& rows = data.rows(layer);
        std::vector<bool> in(saliency[set].size());
        for (int32_t position : kept[set]) {
          const auto at = rows.empty()
                              ? position
                              : std::lower_bound(rows.begin(), rows.end(), position) - rows.begin();
          in[static_cast<size_t>(at)] = true;
        }
        const size_t before = in.size() - std::min<size_t>(effective.always, in.size());
        for (size_t i = 0; i < before; ++i) {
          for (size_t j = i + 1; j < before; ++j) {
            if (saliency[set][i] < saliency[set][j]) {
              EXPECT_TRUE(in[j] || !in[i]) << "layer " << layer << ": " << i << " beside " << j;
            } else {
              EXPECT_TRUE(in[i] || !in[j]) << "layer " << layer << ": " << j << " beside " << i;
            }
            ties += saliency[set][i] == saliency[set][j] && in[i] != in[j] ? 1 : 0;
          }
        }
      }
    }
  });
  EXPECT_GT(ties, 10);
}

// Equal keys have equal saliency wherever they lie, in another lane, tile or tail: to the bit with
// the reference, to rounding with backends that scale each tile's exponentials, to that of
// tests/kernels/saliency_bound.h twice with those that keep them in float16.
TEST_P(SelectionPropertiesTest, EqualKeysHaveEqualSaliency) {
  int pairs = 0;
  ForEachPrompt(7, true, [&](const PromptData& data, const Answer& answer) {
    if (data.effective().statistic != v1::STATISTIC_WINDOW_QUERIES) return;
    const bool half = backend_->KeepsHalfWeights(ShapesOf(SpecOf(data.open())));
    const double rounding = half ? 0x1p-10 : GetParam() == "reference" ? 0 : 1e-5;
    const double of_a_head = half ? 0x1p-24 : 0;
    const v1::ModelGeometry& geometry = data.open().geometry();
    const uint64_t row = geometry.key_dim() * ElementBytes(data.open().dtype());
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      const uint64_t tokens = data.tokens(layer);
      const std::string& bytes = data.tensor(layer, v1::TENSOR_KEYS);
      if (bytes.empty()) continue;
      std::vector<std::string> keys(tokens);  // of all heads
      for (uint64_t token = 0; token < tokens; ++token) {
        for (uint32_t head = 0; head < geometry.kv_head_count(); ++head) {
          keys[token].append(bytes, data.RowIndex(layer, head, token) * row, row);
        }
      }
      const uint64_t before = tokens - std::min<uint64_t>(data.effective().always, tokens);
      for (const std::vector<float>& saliency : Saliency(data, answer, layer)) {
        for (uint64_t i = 0; i < before; ++i) {
          for (uint64_t j = i + 1; j < before; ++j) {
            if (keys[i] != keys[j]) continue;
            ++pairs;
            EXPECT_NEAR(saliency[i], saliency[j],
                        rounding * saliency[i] + of_a_head * geometry.query_head_count())
                << "layer " << layer << ", " << i << " and " << j;
          }
        }
      }
    }
  });
  EXPECT_GT(pairs, 100);
}

}  // namespace
}  // namespace structkv::testkit
