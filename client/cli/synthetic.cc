#include "client/cli/synthetic.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "structkv/sizes.h"

namespace structkv::cli {
namespace {

struct Known {
  const char* name;
  uint32_t layers, query_heads, kv_heads, key_dim, value_dim;
  // Of MLA: the head size that the scores are scaled by, and values that are a part of the keys.
  uint32_t latent_of = 0;
};
constexpr Known kKnown[] = {
    {"tiny-llama", 12, 6, 2, 32, 32},      {"llama-3.2-1b", 16, 32, 8, 64, 64},
    {"llama-3.1-8b", 32, 32, 8, 128, 128}, {"llama-3.1-70b", 80, 64, 8, 128, 128},
    {"ministral-8b", 36, 32, 8, 128, 128}, {"mistral-nemo-12b", 40, 32, 8, 128, 128},
    {"qwen2.5-7b", 28, 28, 4, 128, 128},   {"qwen2.5-14b", 48, 40, 8, 128, 128},
    {"qwen2.5-32b", 64, 40, 8, 128, 128},  {"deepseek-v3", 61, 128, 1, 576, 512, 192},
};

constexpr uint64_t kAlignment = 64;

uint64_t RoundUp(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// xorshift64*: cheap, and good enough for tensors that nobody reads.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 0x9E3779B97F4A7C15U) {}
  // Uniform in [-1, 1).
  float Next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    const uint64_t bits = state_ * 0x2545F4914F6CDD1DU;
    return static_cast<float>(static_cast<int32_t>(bits >> 32)) * 0x1p-31F;
  }

 private:
  uint64_t state_;
};

// Of a value of magnitude 2^-14 to 2^16, or zero for less.
uint16_t ToHalf(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23 & 0xFF) - 127 + 15;
  const uint32_t sign = bits >> 16 & 0x8000;
  if (exponent <= 0) return static_cast<uint16_t>(sign);
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3FF));
}

// Of a value of magnitude 2^-6 to 448, or zero for less.
uint8_t ToE4M3(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23 & 0xFF) - 127 + 7;
  const uint32_t sign = bits >> 24 & 0x80;
  if (exponent <= 0) return static_cast<uint8_t>(sign);
  return static_cast<uint8_t>(sign | static_cast<uint32_t>(exponent) << 3 | (bits >> 20 & 0x7));
}

void Fill(std::byte* out, uint64_t bytes, v1::DType dtype, float scale, Random* random) {
  const uint64_t step = client::ElementBytes(dtype);
  for (uint64_t at = 0; at < bytes; at += step) {
    const float value = random->Next() * scale;
    if (dtype == v1::DTYPE_F32) {
      std::memcpy(out + at, &value, sizeof value);
      continue;
    }
    if (dtype == v1::DTYPE_F8_E4M3) {
      out[at] = static_cast<std::byte>(ToE4M3(value));
      continue;
    }
    if (dtype == v1::DTYPE_F8_E5M2) {
      out[at] = static_cast<std::byte>(ToHalf(value) >> 8);
      continue;
    }
    uint16_t half = 0;
    if (dtype == v1::DTYPE_F16) {
      half = ToHalf(value);
    } else {
      uint32_t bits = 0;
      std::memcpy(&bits, &value, sizeof bits);
      half = static_cast<uint16_t>(bits >> 16);
    }
    std::memcpy(out + at, &half, sizeof half);
  }
}

}  // namespace

std::vector<std::string> GeometryNames() {
  std::vector<std::string> names;
  for (const Known& known : kKnown) names.emplace_back(known.name);
  return names;
}

absl::StatusOr<KnownModel> ModelByName(const std::string& name) {
  for (const Known& known : kKnown) {
    if (name != known.name) continue;
    KnownModel model;
    v1::ModelGeometry& geometry = model.geometry;
    geometry.set_layer_count(known.layers);
    geometry.set_query_head_count(known.query_heads);
    geometry.set_kv_head_count(known.kv_heads);
    geometry.set_key_dim(known.key_dim);
    geometry.set_value_dim(known.value_dim);
    if (known.latent_of != 0) {
      geometry.set_values_in_keys(true);
      model.attention_scale = 1 / std::sqrt(static_cast<double>(known.latent_of));
    }
    return model;
  }
  return absl::NotFoundError(absl::StrCat("geometry '", name, "' is unknown; known are ",
                                          absl::StrJoin(GeometryNames(), ", ")));
}

void PageAtRandom(uint32_t block_tokens, uint64_t seed, v1::Open* open) {
  v1::PagedLayout* paged = open->mutable_paged();
  const uint32_t blocks = (open->prompt_tokens() + block_tokens - 1) / block_tokens;
  std::vector<uint32_t> table(blocks);
  std::iota(table.begin(), table.end(), 0U);
  std::shuffle(table.begin(), table.end(), std::mt19937_64(seed));
  paged->set_block_tokens(block_tokens);
  paged->set_block_count(blocks);
  paged->mutable_block_table()->Assign(table.begin(), table.end());
}

SyntheticPrompt::Sizes::Sizes(const v1::Open& open, const v1::Opened& opened)
    : keys(client::InputTensorBytes(open, opened, v1::TENSOR_KEYS)),
      values(client::InputTensorBytes(open, opened, v1::TENSOR_VALUES)),
      saliency(client::InputTensorBytes(open, opened, v1::TENSOR_SALIENCY)),
      scales(client::InputTensorBytes(open, opened, v1::TENSOR_KEY_SCALES)),
      queries(client::InputTensorBytes(open, opened, v1::TENSOR_WINDOW_QUERIES)),
      value_scales(client::InputTensorBytes(open, opened, v1::TENSOR_VALUE_SCALES) > 0) {}

uint64_t SyntheticPrompt::SizeOf(const v1::Open& open, const v1::Opened& opened) {
  const Sizes sizes(open, opened);
  uint64_t bytes = open.geometry().layer_count() * RoundUp(sizes.queries);
  for (const uint64_t size : {sizes.keys, sizes.values, sizes.saliency, sizes.scales}) {
    bytes += RoundUp(size);
  }
  return bytes;
}

client::Bytes SyntheticPrompt::AllocateOnHeap(size_t size) {
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kAlignment, RoundUp(size)));
  return {memory, size, std::shared_ptr<void>(memory, [](void* data) { std::free(data); })};
}

// The tensor at `*at`, which becomes the next one's place.
absl::Span<std::byte> SyntheticPrompt::Take(uint64_t* at, uint64_t size) const {
  return data_.span().subspan(std::exchange(*at, *at + RoundUp(size)), size);
}

SyntheticPrompt::SyntheticPrompt(const v1::Open& open, const v1::Opened& opened, uint64_t seed,
                                 const Allocator& allocate)
    : sizes_(open, opened), data_(allocate(SizeOf(open, opened))) {
  Random random(seed);
  uint64_t at = 0;
  const auto fill_floats = [&](uint64_t size, float middle, float spread) {
    const absl::Span<std::byte> tensor = Take(&at, size);
    for (uint64_t i = 0; i < size; i += sizeof(float)) {
      const float value = middle + spread * random.Next();
      std::memcpy(&tensor[i], &value, sizeof value);
    }
  };
  for (const uint64_t size : {sizes_.keys, sizes_.values}) {
    Fill(Take(&at, size).data(), size, open.dtype(), 1.0F, &random);
  }
  fill_floats(sizes_.saliency, 0.5F, 0.5F);
  fill_floats(sizes_.scales, 1.0F, 0.25F);
  const uint32_t layers = open.geometry().layer_count();
  for (uint32_t layer = 0; layer < layers; ++layer) {
    // Deeper layers attend more sharply, so that their metrics differ.
    const float depth = static_cast<float>(layer + 1) / static_cast<float>(layers);
    Fill(Take(&at, sizes_.queries).data(), sizes_.queries, client::QueryDType(open),
         1.0F + 3.0F * depth, &random);
  }
}

absl::Status SyntheticPrompt::MoveTo(client::Arena* arena) {
  absl::StatusOr<client::Bytes> block = arena->Allocate(data_.size());
  if (!block.ok()) return block.status();
  client::Region& region = *arena->region();
  absl::Status status = region.Write(*region.OffsetOf(block->span()), data_.span());
  if (status.ok()) data_ = *std::move(block);
  return status;
}

client::LayerTensors SyntheticPrompt::Layer(uint32_t layer) const {
  uint64_t at = 0;
  client::LayerTensors tensors;
  tensors.keys = Take(&at, sizes_.keys);
  tensors.values = Take(&at, sizes_.values);
  tensors.saliency = Take(&at, sizes_.saliency);
  tensors.key_scales = Take(&at, sizes_.scales);
  if (sizes_.value_scales) tensors.value_scales = tensors.key_scales;
  at += layer * RoundUp(sizes_.queries);
  tensors.window_queries = Take(&at, sizes_.queries);
  tensors.owner = data_.owner();
  return tensors;
}

}  // namespace structkv::cli
