#include "client/cpp/cache_info.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "structkv/sizes.h"

namespace structkv::client::internal {
namespace {

// Far above what servers take (Limits), and so that no size overflows 64 bits.
constexpr uint64_t kMaxLayers = 1 << 14;
constexpr uint64_t kMaxHeads = 1 << 14;
constexpr uint64_t kMaxDim = 1 << 14;
constexpr uint64_t kMaxTokens = INT32_MAX;
constexpr uint64_t kMaxBlockTokens = 4096;

constexpr v1::Tensor kTensors[] = {v1::TENSOR_POSITIONS, v1::TENSOR_KEYS, v1::TENSOR_VALUES,
                                   v1::TENSOR_KEY_SCALES, v1::TENSOR_VALUE_SCALES};

template <typename... Args>
absl::Status Broken(const Args&... args) {
  return absl::DataLossError(absl::StrCat("the server broke the protocol: CacheInfo.", args...));
}

absl::Status CheckRange(absl::string_view field, uint64_t value, uint64_t least, uint64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return Broken(field, " is ", value, "; ", least, " to ", most, " are allowed");
}

absl::Status CheckSame(absl::string_view field, uint64_t value, uint64_t due) {
  if (value == due) return absl::OkStatus();
  return Broken(field, " is ", value, "; ", due, " was asked for");
}

absl::Status First(std::initializer_list<absl::Status> checks) {
  const auto* const bad = std::find_if(checks.begin(), checks.end(),
                                       [](const absl::Status& status) { return !status.ok(); });
  return bad == checks.end() ? absl::OkStatus() : *bad;
}

absl::Status CheckGeometry(const v1::CacheInfo& info) {
  const v1::ModelGeometry& geometry = info.geometry();
  if (ElementBytes(info.dtype()) == 0) return Broken("dtype is ", info.dtype(), ", which is none");
  return First({CheckRange("geometry.layer_count", geometry.layer_count(), 1, kMaxLayers),
                CheckRange("geometry.query_head_count", geometry.query_head_count(), 1, kMaxHeads),
                CheckRange("geometry.kv_head_count", geometry.kv_head_count(), 1, kMaxHeads),
                CheckRange("geometry.key_dim", geometry.key_dim(), 1, kMaxDim),
                CheckRange("geometry.value_dim", geometry.value_dim(), 0, kMaxDim),
                CheckRange("block_tokens", info.block_tokens(), 0, kMaxBlockTokens),
                CheckRange("logical_length", info.logical_length(), 1, kMaxTokens),
                CheckRange("kv_length", info.kv_length(), 0, info.logical_length())});
}

// Against what was asked for.
absl::Status CheckSlice(const v1::CacheInfo& info, const FetchOptions& options) {
  const v1::HeadRange& held = info.held_kv_heads();
  const uint64_t held_end = uint64_t{held.begin()} + held.count();
  const bool all_heads = options.first_kv_head == 0 && options.kv_head_count == 0;
  const uint64_t first = all_heads ? held.begin() : options.first_kv_head;
  absl::Status status = First(
      {CheckRange("held_kv_heads.count", held.count(), 1, kMaxHeads),
       CheckRange("held_kv_heads.begin + count", held_end, 1, info.geometry().kv_head_count()),
       CheckSame("kv_heads.begin", info.kv_heads().begin(), first),
       CheckRange("kv_heads.begin", first, held.begin(), held_end - 1),
       CheckSame("first_layer", info.first_layer(), options.first_layer),
       CheckRange("first_layer", info.first_layer(), 0, info.geometry().layer_count() - 1)});
  if (!status.ok()) return status;
  const uint64_t heads = options.kv_head_count == 0 ? held_end - first : options.kv_head_count;
  const uint64_t rest = info.geometry().layer_count() - info.first_layer();
  const uint64_t layers = options.layer_count == 0 ? rest : options.layer_count;
  return First({CheckSame("kv_heads.count", info.kv_heads().count(), heads),
                CheckRange("kv_heads.count", heads, 1, held_end - first),
                CheckSame("layer_count", info.layer_count(), layers),
                CheckRange("layer_count", layers, 1, rest)});
}

absl::Status CheckSizes(const v1::CacheInfo& info, uint64_t max_bytes) {
  const uint32_t layers = info.layer_count();
  if (static_cast<uint32_t>(info.kept_tokens_size()) != layers ||
      static_cast<uint32_t>(info.layer_bytes_size()) != layers) {
    return Broken("kept_tokens has ", info.kept_tokens_size(), " entries and layer_bytes ",
                  info.layer_bytes_size(), ", for ", layers, " layers");
  }
  const v1::Open open = OpenOf(info);
  const v1::Opened opened = OpenedOf(info);
  uint64_t total = 0;
  for (uint32_t i = 0; i < layers; ++i) {
    const uint32_t layer = info.first_layer() + i;
    const uint32_t kept = info.kept_tokens(static_cast<int>(i));
    if (kept > info.kv_length()) {
      return Broken("kept_tokens is ", kept, " of layer ", layer, "; kv_length is ",
                    info.kv_length());
    }
    uint64_t bytes = 0;
    for (const v1::Tensor tensor : kTensors) {
      bytes += OutputTensorBytes(open, opened, layer, tensor);
    }
    if (bytes != info.layer_bytes(static_cast<int>(i))) {
      return Broken("layer_bytes is ", info.layer_bytes(static_cast<int>(i)), " of layer ", layer,
                    ", whose tensors have ", bytes);
    }
    if (bytes > max_bytes - total) {
      return absl::ResourceExhaustedError(absl::StrCat("CacheInfo.layer_bytes up to layer ", layer,
                                                       " are ", total, " and ", bytes,
                                                       "; FetchOptions.max_bytes is ", max_bytes));
    }
    total += bytes;
  }
  if (total == info.total_bytes()) return absl::OkStatus();
  return Broken("total_bytes is ", info.total_bytes(), ", its layers have ", total);
}

}  // namespace

absl::Status CheckCacheInfo(const v1::CacheInfo& info, const FetchOptions& options) {
  if (absl::Status status = CheckGeometry(info); !status.ok()) return status;
  if (absl::Status status = CheckSlice(info, options); !status.ok()) return status;
  return CheckSizes(info, options.max_bytes);
}

}  // namespace structkv::client::internal
