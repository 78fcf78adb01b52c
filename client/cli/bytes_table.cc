#include "client/cli/bytes_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cli/synthetic.h"
#include "client/cli/text.h"
#include "service/rpc/open_decoder.h"
#include "structkv/sizes.h"

namespace structkv::cli {
namespace {

constexpr uint32_t kTokens[] = {8192, 32768, 131072, 1048576};

uint64_t InputBytes(const v1::Open& open, const v1::Opened& opened, bool skeleton) {
  uint64_t bytes = skeleton ? client::SkeletonTensorBytes(open, opened, v1::TENSOR_POSITIONS) : 0;
  for (const int required : opened.required_tensors()) {
    const auto tensor = static_cast<v1::Tensor>(required);
    bytes += skeleton ? client::SkeletonTensorBytes(open, opened, tensor)
                      : client::InputTensorBytes(open, opened, tensor);
  }
  return bytes;
}

}  // namespace

absl::StatusOr<std::vector<Mode>> ModesOf(const std::string& geometry) {
  absl::StatusOr<KnownModel> known = ModelByName(geometry);
  if (!known.ok()) return known.status();
  v1::Open compact;
  *compact.mutable_geometry() = known->geometry;
  if (known->attention_scale.has_value()) compact.set_attention_scale(*known->attention_scale);
  compact.set_dtype(v1::DTYPE_BF16);
  compact.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  compact.mutable_method()->mutable_structkv();
  compact.set_statistic(v1::STATISTIC_WINDOW_QUERIES);
  const uint32_t half = compact.geometry().layer_count() / 2;
  v1::Open fixed = compact;
  v1::Pivot* pivot = fixed.mutable_method()->mutable_structkv()->mutable_pivot();
  pivot->set_mode(v1::PIVOT_MODE_FIXED);
  pivot->set_fixed_layer(half);
  v1::Open pull = compact;
  pull.set_pull(v1::PULL_VALUES);
  v1::Open pull_both = compact;
  pull_both.set_pull(v1::PULL_KEYS_AND_VALUES);
  pull_both.set_statistic(v1::STATISTIC_SALIENCY);
  v1::Open plan = compact;
  plan.set_output(v1::OUTPUT_PLAN);
  v1::Open plan_saliency = plan;
  plan_saliency.set_statistic(v1::STATISTIC_SALIENCY);
  v1::Open plan_heads = plan;
  plan_heads.set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
  plan_heads.mutable_method()->mutable_structkv()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
  std::vector<Mode> modes = {
      {"compaction", compact},
      {absl::StrCat("compaction, skeleton rows after a pivot at layer ", half), fixed, true},
  };
  // Values that are a part of the keys have no rows to pull.
  if (!compact.geometry().values_in_keys()) {
    modes.push_back({"pull of values", pull});
    modes.push_back({"pull of keys and values, saliency `[N]`", pull_both});
  }
  modes.push_back({"plan, window queries and keys", plan});
  modes.push_back({"plan, saliency `[N]`", plan_saliency});
  modes.push_back({"plan, saliency `[Hkv, N]`, per KV head", plan_heads});
  return modes;
}

absl::StatusOr<MovedBytes> MovedBytesOf(const Mode& mode, uint32_t tokens) {
  v1::Open open = mode.open;
  open.set_prompt_tokens(tokens);
  absl::StatusOr<rpc::OpenRequest> request = rpc::DecodeOpen(open, rpc::kDefaultMessageBytes);
  if (!request.ok()) return request.status();
  const v1::Opened opened = rpc::EncodeOpened(request->spec);
  const uint32_t layers = open.geometry().layer_count();
  const uint32_t skeleton_from =
      mode.skeleton_rows ? open.method().structkv().pivot().fixed_layer() + 1 : layers;
  MovedBytes moved;
  moved.out = sizeof(int32_t) * uint64_t{opened.skeleton_tokens()};
  for (uint32_t layer = 0; layer < layers; ++layer) {
    const bool skeleton = layer >= skeleton_from;
    const uint32_t held = skeleton ? opened.skeleton_tokens() : tokens;
    const uint32_t kept = std::min(opened.kept_tokens(static_cast<int>(layer)), held);
    const auto answer = [&](v1::Tensor tensor) {
      return client::AnswerTensorBytes(open, opened, tensor, held, kept);
    };
    moved.in += InputBytes(open, opened, skeleton);
    moved.out += answer(v1::TENSOR_POSITIONS) + answer(v1::TENSOR_KEYS) +
                 answer(v1::TENSOR_VALUES) + answer(v1::TENSOR_SALIENCY);
    if (open.pull() == v1::PULL_UNSPECIFIED) continue;
    moved.out += answer(v1::TENSOR_POSITIONS);
    moved.in += answer(v1::TENSOR_VALUES);
    if (open.pull() == v1::PULL_KEYS_AND_VALUES) moved.in += answer(v1::TENSOR_KEYS);
  }
  return moved;
}

absl::StatusOr<std::string> BytesTable(const std::string& geometry) {
  absl::StatusOr<std::vector<Mode>> modes = ModesOf(geometry);
  if (!modes.ok()) return modes.status();
  std::string table = "| to the server, back |";
  std::string rule = "|---|";
  for (const uint32_t tokens : kTokens) {
    absl::StrAppend(&table, " ", CountText(tokens), " |");
    rule += "---|";
  }
  absl::StrAppend(&table, "\n", rule, "\n");
  for (const Mode& mode : *modes) {
    absl::StrAppend(&table, "| ", mode.name, " |");
    for (const uint32_t tokens : kTokens) {
      const absl::StatusOr<MovedBytes> moved = MovedBytesOf(mode, tokens);
      if (!moved.ok()) return moved.status();
      absl::StrAppend(&table, " ", BytesText(moved->in), ", ", BytesText(moved->out), " |");
    }
    table += "\n";
  }
  return table;
}

}  // namespace structkv::cli
