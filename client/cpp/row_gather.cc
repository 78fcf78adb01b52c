#include "client/cpp/row_gather.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "structkv/sizes.h"

namespace structkv::client::internal {
namespace {

uint64_t RowBytes(const v1::Open& open, v1::Tensor tensor) {
  const v1::ModelGeometry& geometry = open.geometry();
  const bool values = tensor == v1::TENSOR_VALUES && geometry.value_dim() != 0;
  return ElementBytes(open.dtype()) * (values ? geometry.value_dim() : geometry.key_dim());
}

absl::Status CheckSize(const v1::Open& open, uint32_t layer, v1::Tensor tensor, size_t size,
                       size_t tokens) {
  const uint64_t needed = RowsBytes(open, tensor, tokens);
  if (size == needed) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("layer ", layer, ": ", v1::Tensor_Name(tensor),
                                                 " has ", size, " bytes; the server may ask for ",
                                                 "rows of ", needed));
}

// Where the tokens of `wanted` lie among `held`; DATA_LOSS where one does not.
absl::StatusOr<std::vector<int32_t>> Places(absl::Span<const int32_t> wanted,
                                            absl::Span<const int32_t> held, uint32_t layer) {
  std::vector<int32_t> places;
  places.reserve(wanted.size());
  for (const int32_t token : wanted) {
    const auto* place = std::lower_bound(held.begin(), held.end(), token);
    if (place == held.end() || *place != token) {
      return absl::DataLossError(absl::StrCat("the server broke the protocol: it asks for token ",
                                              token, " of layer ", layer,
                                              ", which was sent without it"));
    }
    places.push_back(static_cast<int32_t>(place - held.begin()));
  }
  return places;
}

// `places` is [kept] or [heads, kept].
void Gather(const v1::Open& open, const std::byte* from, size_t row, size_t tokens, size_t kept,
            absl::Span<const int32_t> places, std::byte* to) {
  const size_t heads = KvHeads(open);
  const size_t step = places.size() == kept ? 0 : kept;
  if (open.layout() == v1::LAYOUT_TOKEN_HEAD_DIM) {
    if (step == 0) {  // all heads of a token lie together
      for (size_t i = 0; i < kept; ++i, to += heads * row) {
        std::memcpy(to, from + static_cast<size_t>(places[i]) * heads * row, heads * row);
      }
      return;
    }
    for (size_t i = 0; i < kept; ++i) {
      for (size_t head = 0; head < heads; ++head, to += row) {
        const auto place = static_cast<size_t>(places[head * step + i]);
        std::memcpy(to, from + (place * heads + head) * row, row);
      }
    }
    return;
  }
  for (size_t head = 0; head < heads; ++head, from += tokens * row) {
    for (size_t i = 0; i < kept; ++i, to += row) {
      std::memcpy(to, from + static_cast<size_t>(places[head * step + i]) * row, row);
    }
  }
}

}  // namespace

uint64_t RowsBytes(const v1::Open& open, v1::Tensor tensor, uint64_t rows) {
  return RowBytes(open, tensor) * KvHeads(open) * rows;
}

absl::Status CheckPullable(const v1::Open& open, uint32_t layer, const LayerTensors& tensors,
                           size_t tokens) {
  absl::Status status = CheckSize(open, layer, v1::TENSOR_VALUES, tensors.values.size(), tokens);
  if (!status.ok() || open.pull() != v1::PULL_KEYS_AND_VALUES) return status;
  return CheckSize(open, layer, v1::TENSOR_KEYS, tensors.keys.size(), tokens);
}

absl::StatusOr<PulledRows> GatherPulledRows(const v1::Open& open, const LayerTensors& tensors,
                                            absl::Span<const int32_t> positions,
                                            const RowPull& pull, RowAllocator allocate) {
  const size_t tokens = positions.empty() ? open.prompt_tokens() : positions.size();
  absl::Status status = CheckPullable(open, pull.layer, tensors, tokens);
  if (!status.ok()) return status;
  PulledRows rows;
  rows.values = tensors.values;
  if (pull.keys) rows.keys = tensors.keys;
  rows.owner = tensors.owner;
  if (pull.kept_tokens == tokens) return rows;
  absl::Span<const int32_t> places = pull.position_values();
  std::vector<int32_t> among;
  if (!positions.empty()) {
    absl::StatusOr<std::vector<int32_t>> found = Places(places, positions, pull.layer);
    if (!found.ok()) return found.status();
    among = *std::move(found);
    places = among;
  }
  auto owners = std::make_shared<std::vector<Bytes>>();
  const auto gather = [&](v1::Tensor tensor, absl::Span<const std::byte>* span) {
    const size_t row = RowBytes(open, tensor);
    const size_t kept = pull.kept_tokens;
    absl::StatusOr<Bytes> out = allocate(KvHeads(open) * kept * row);
    if (!out.ok()) return out.status();
    Gather(open, span->data(), row, tokens, kept, places, out->data());
    *span = out->span();
    owners->push_back(*std::move(out));
    return absl::OkStatus();
  };
  if (absl::Status gathered = gather(v1::TENSOR_VALUES, &rows.values); !gathered.ok()) {
    return gathered;
  }
  if (absl::Status gathered = pull.keys ? gather(v1::TENSOR_KEYS, &rows.keys) : absl::OkStatus();
      !gathered.ok()) {
    return gathered;
  }
  rows.owner = std::move(owners);
  return rows;
}

}  // namespace structkv::client::internal
