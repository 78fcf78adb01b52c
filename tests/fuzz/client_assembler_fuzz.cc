// The client's assembler under any server: it never crashes, asks for no more memory than the
// prompt has, and gives out nothing that is not whole. The input: flags of `open`, then messages,
// each after its length in two bytes.
#include <set>
#include <utility>
#include <variant>

#include "client/cpp/assembler.h"
#include "structkv/sizes.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/fuzz/quiet_protobuf.h"

namespace structkv::client::internal {
namespace {

v1::Open MakeOpen(uint8_t flags) {
  v1::Open open;
  open.mutable_geometry()->set_layer_count(2);
  open.mutable_geometry()->set_query_head_count(2);
  open.mutable_geometry()->set_kv_head_count(2);
  open.mutable_geometry()->set_key_dim(2);
  open.set_prompt_tokens(8);
  open.set_dtype(v1::DTYPE_F16);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.set_return_saliency((flags & 1) != 0);
  open.set_return_centrality((flags & 2) != 0);
  if ((flags & 4) != 0) open.set_output(v1::OUTPUT_PLAN);
  if ((flags & 12) == 8) open.set_pull(v1::PULL_VALUES);
  return open;
}

void CheckLayer(const v1::Open& open, const v1::Opened& opened, const LayerResult& result) {
  const std::pair<v1::Tensor, const Bytes*> tensors[] = {{v1::TENSOR_POSITIONS, &result.positions},
                                                         {v1::TENSOR_KEYS, &result.keys},
                                                         {v1::TENSOR_VALUES, &result.values},
                                                         {v1::TENSOR_SALIENCY, &result.saliency}};
  for (const auto& [tensor, bytes] : tensors) {
    const uint64_t expected = OutputTensorBytes(open, opened, result.layer, tensor);
    FUZZ_CHECK(expected == 0 ? bytes->empty() : bytes->size() >= expected);
  }
  for (int32_t position : result.position_values()) {
    FUZZ_CHECK(position >= 0 && position < static_cast<int32_t>(open.prompt_tokens()));
  }
}

void CheckPull(const v1::Open& open, const RowPull& pull) {
  FUZZ_CHECK(open.pull() == v1::PULL_VALUES && pull.layer < open.geometry().layer_count());
  FUZZ_CHECK(pull.position_values().size() >= pull.kept_tokens);
  // The rows at these places are read from the caller's memory.
  for (int32_t position : pull.position_values()) {
    FUZZ_CHECK(position >= 0 && position < static_cast<int32_t>(open.prompt_tokens()));
  }
}

void Run(fuzz::FuzzInput input) {
  const v1::Open open = MakeOpen(input.Byte());
  BytesPool pool(1 << 16);
  Assembler assembler(open, nullptr, &pool);
  std::set<uint32_t> layers;
  std::set<uint32_t> pulls;
  int pivots = 0;
  while (!input.empty()) {
    const std::string bytes = input.Bytes(input.Short());
    const grpc::Slice slice(bytes.data(), bytes.size());
    absl::StatusOr<wire::Response> response = wire::DecodeResponse(grpc::ByteBuffer(&slice, 1));
    if (!response.ok()) return;
    const absl::StatusOr<std::optional<Event>> event = assembler.Add(*std::move(response));
    if (!event.ok()) {
      const bool unknown = open.pull() != 0 && absl::IsUnimplemented(event.status());
      FUZZ_CHECK(absl::IsDataLoss(event.status()) || unknown);
      return;
    }
    if (const std::optional<RowPull> pull = assembler.TakePull()) {
      CheckPull(open, *pull);
      FUZZ_CHECK(pulls.insert(pull->layer).second);
    }
    if (!event->has_value()) continue;
    if (const auto* layer = std::get_if<LayerResult>(&**event)) {
      FUZZ_CHECK(layers.insert(layer->layer).second);
      FUZZ_CHECK(open.pull() == 0 || pulls.contains(layer->layer));
      CheckLayer(open, assembler.opened(), *layer);
    } else if (const auto* pivot = std::get_if<PivotResult>(&**event)) {
      FUZZ_CHECK(++pivots == 1);
      FUZZ_CHECK(pivot->pivot_layer < open.geometry().layer_count());
      FUZZ_CHECK(pivot->skeleton.size() == assembler.opened().skeleton_tokens());
      FUZZ_CHECK(pivot->centrality.size() == (open.return_centrality() ? 8 : 0));
      // The skeleton's entries are promised to be positions.
      for (int32_t position : pivot->skeleton) {
        FUZZ_CHECK(position >= 0 && position < static_cast<int32_t>(open.prompt_tokens()));
      }
    }
  }
  const absl::StatusOr<v1::Summary> summary = assembler.Finish(1000);
  FUZZ_CHECK(summary.ok() || absl::IsDataLoss(summary.status()));
  FUZZ_CHECK(!summary.ok() || layers.size() == open.geometry().layer_count());
}

}  // namespace
}  // namespace structkv::client::internal

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  structkv::client::internal::Run({data, size});
  return 0;
}
