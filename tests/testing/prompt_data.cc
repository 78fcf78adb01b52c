#include "tests/testing/prompt_data.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "tests/testing/oracle.h"

namespace structkv::testkit {
namespace {

uint32_t Kept(const v1::Budget& budget, double default_ratio, uint32_t window, uint32_t tokens) {
  const double ratio = budget.has_ratio() ? budget.ratio() : default_ratio;
  const auto share = static_cast<uint32_t>(std::ceil(ratio * tokens - 1e-9));
  if (budget.kind() == v1::BUDGET_KIND_WINDOW_ON_TOP) return std::min(tokens, share + window);
  if (budget.kind() == v1::BUDGET_KIND_KVPRESS) {
    return std::clamp(static_cast<uint32_t>(ratio * tokens), std::max(window, 1U), tokens);
  }
  return std::clamp(share, window, tokens);
}

// PyramidKV's counts, layer by layer.
std::vector<uint32_t> PyramidLayers(uint32_t kept, uint32_t window, uint32_t tokens, double beta,
                                    uint32_t layers) {
  const double mean = kept - window;
  const double most = tokens - window;
  double bottom = mean / beta;
  double top = 2 * mean - bottom;
  if (top > most) {
    top = most;
    bottom = 2 * mean - most;
  }
  std::vector<uint32_t> counts(layers, window);
  auto missing = static_cast<int64_t>(mean) * layers;
  for (uint32_t l = 0; l < layers; ++l) {
    const double ideal = layers == 1 ? mean : top - l * (top - bottom) / (layers - 1);
    // A whole number must not be taken for a little less than it is.
    const auto whole = static_cast<uint32_t>(std::floor(ideal + 1e-9));
    counts[l] += whole;
    missing -= whole;
  }
  for (uint32_t l = 0; l < layers && missing > 0; ++l) {
    if (counts[l] == tokens) continue;
    ++counts[l];
    --missing;
  }
  return counts;
}

// Where a token lies in dense [head, token] or [token, head] vectors.
uint64_t DenseRow(v1::Layout layout, uint64_t heads, uint64_t tokens, uint64_t head,
                  uint64_t token) {
  return layout == v1::LAYOUT_HEAD_TOKEN_DIM ? head * tokens + token : token * heads + head;
}

// The same in blocks, each dense.
uint64_t PagedRow(v1::Layout layout, uint64_t heads, uint64_t block_tokens, uint64_t block,
                  uint64_t head, uint64_t slot) {
  return block * heads * block_tokens + DenseRow(layout, heads, block_tokens, head, slot);
}

}  // namespace

uint64_t OutputRowIndex(const v1::Open& open, uint64_t kept, uint64_t head, uint64_t i) {
  const uint64_t heads = open.geometry().kv_head_count();
  if (!open.has_paged()) return DenseRow(open.layout(), heads, kept, head, i);
  const uint64_t block = open.paged().block_tokens();
  return PagedRow(open.layout(), heads, block, i / block, head, i % block);
}

uint64_t OutputRows(const v1::Open& open, uint64_t kept) {
  const uint64_t block = open.has_paged() ? open.paged().block_tokens() : 1;
  return (kept + block - 1) / block * block * open.geometry().kv_head_count();
}

v1::Open SmallOpen(uint32_t tokens) {
  v1::Open open;
  v1::ModelGeometry* geometry = open.mutable_geometry();
  geometry->set_layer_count(4);
  geometry->set_query_head_count(4);
  geometry->set_kv_head_count(2);
  geometry->set_key_dim(32);
  open.set_prompt_tokens(tokens);
  open.set_dtype(v1::DTYPE_BF16);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.set_model_id("synthetic");
  return open;
}

void PageAtRandom(uint32_t block_tokens, uint32_t spare, uint64_t seed, v1::Open* open) {
  const uint32_t needed = (open->prompt_tokens() + block_tokens - 1) / block_tokens;
  std::vector<uint32_t> blocks(needed + spare);
  for (uint32_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  Random random(seed);
  for (size_t i = blocks.size(); i > 1; --i) {
    std::swap(blocks[i - 1], blocks[random.Between(0, static_cast<int64_t>(i) - 1)]);
  }
  v1::PagedLayout* paged = open->mutable_paged();
  paged->Clear();
  paged->set_block_tokens(block_tokens);
  paged->set_block_count(static_cast<uint32_t>(blocks.size()));
  for (uint32_t i = 0; i < needed; ++i) paged->add_block_table(blocks[i]);
}

Effective::Effective(const v1::Open& open) {
  const v1::Method& method = open.method();
  const uint32_t tokens = open.prompt_tokens();
  plan = open.output() == v1::OUTPUT_PLAN;
  value_dim =
      open.geometry().value_dim() != 0 ? open.geometry().value_dim() : open.geometry().key_dim();
  const bool fp8 = ElementBytes(open.dtype()) == 1;
  query_dtype = open.query_dtype() != v1::DTYPE_UNSPECIFIED ? open.query_dtype()
                : fp8                                       ? v1::DTYPE_BF16
                                                            : open.dtype();
  if (open.kv_scales() == v1::KV_SCALES_PER_TENSOR) scales = 1;
  if (open.kv_scales() == v1::KV_SCALES_PER_KV_HEAD) scales = open.geometry().kv_head_count();
  snapkv = method.has_snapkv();
  streaming = method.has_streaming_llm();
  full = method.has_full();
  pyramidkv = method.has_pyramidkv();
  fastkv = method.has_fastkv();
  gemfilter = method.has_gemfilter();
  h2o = method.has_h2o();
  structkv = method.has_structkv() || method.kind_case() == v1::Method::KIND_NOT_SET;
  // What the methods with an observation window share.
  const auto scoring = [&](const auto& m, uint32_t default_window, v1::Pooling default_pooling,
                           uint32_t default_kernel) {
    window = std::min(m.has_window_tokens() ? m.window_tokens() : default_window, tokens);
    kept = Kept(m.kv_budget(), 0.10, window, tokens);
    pooling = m.pooling() != v1::POOLING_UNSPECIFIED ? m.pooling() : default_pooling;
    kernel = m.has_pooling_kernel() ? m.pooling_kernel() : default_kernel;
    if (m.window_reduce() != v1::WINDOW_REDUCE_UNSPECIFIED) window_reduce = m.window_reduce();
    if (m.group_reduce() != v1::GROUP_REDUCE_UNSPECIFIED) reduce = m.group_reduce();
  };
  if (structkv) {
    const v1::StructKvMethod& m = method.structkv();
    scoring(m, 8, v1::POOLING_NONE, 5);
    skeleton = Kept(m.skeleton_budget(), 0.20, window, tokens);
    per_head = m.granularity() == v1::GRANULARITY_PER_KV_HEAD;
  } else if (snapkv) {
    const v1::SnapKvMethod& m = method.snapkv();
    scoring(m, 32, v1::POOLING_AVG, 5);
    per_head = m.granularity() != v1::GRANULARITY_PER_LAYER;
  } else if (pyramidkv) {
    const v1::PyramidKvMethod& m = method.pyramidkv();
    scoring(m, 32, v1::POOLING_AVG, 5);
    per_head = m.granularity() != v1::GRANULARITY_PER_LAYER;
    layers = PyramidLayers(kept, window, tokens, m.has_beta() ? m.beta() : 20,
                           open.geometry().layer_count());
  } else if (fastkv) {
    const v1::FastKvMethod& m = method.fastkv();
    scoring(m, 8, v1::POOLING_MAX, 7);
    per_head = m.granularity() != v1::GRANULARITY_PER_LAYER;
    skeleton = Kept(m.skeleton_budget(), 0.20, window, tokens);
    skeleton_layer = m.tsp_layer();
  } else if (gemfilter) {
    scoring(method.gemfilter(), 1, v1::POOLING_AVG, 5);
    skeleton = kept;
    skeleton_layer = method.gemfilter().filter_layer();
    layers.assign(open.geometry().layer_count(), 0);
    layers[*skeleton_layer] = kept;
  } else if (h2o) {
    const v1::H2oMethod& m = method.h2o();
    kept = std::max(1U, Kept(m.kv_budget(), 0.10, 0, tokens));
    const double share = m.has_recent_share() ? m.recent_share() : 0.5;
    always = static_cast<uint32_t>(std::floor(share * kept + 1e-9));
    per_head = m.granularity() == v1::GRANULARITY_PER_KV_HEAD ||
               (m.granularity() == v1::GRANULARITY_UNSPECIFIED &&
                open.statistic() != v1::STATISTIC_SALIENCY);
  } else if (streaming) {
    const v1::StreamingLlmMethod& m = method.streaming_llm();
    sinks = std::min(m.has_sink_tokens() ? m.sink_tokens() : 4, tokens);
    kept = Kept(m.kv_budget(), 0.10, sinks, tokens);
  } else {
    kept = tokens;
  }
  if (!streaming && !full) {
    statistic = open.statistic() != v1::STATISTIC_UNSPECIFIED ? open.statistic()
                : h2o                                         ? v1::STATISTIC_SALIENCY_PER_KV_HEAD
                                                              : v1::STATISTIC_WINDOW_QUERIES;
  }
  if (!h2o) always = window;
  if (layers.empty()) layers.assign(open.geometry().layer_count(), kept);
  for (uint32_t count : layers) largest = std::max(largest, count);
  const bool queries = statistic == v1::STATISTIC_WINDOW_QUERIES;
  if (!plan || queries) tensors.push_back(v1::TENSOR_KEYS);
  if (!plan && !open.geometry().values_in_keys()) tensors.push_back(v1::TENSOR_VALUES);
  if (queries) tensors.push_back(v1::TENSOR_WINDOW_QUERIES);
  if (queries && open.window_lse()) tensors.push_back(v1::TENSOR_WINDOW_LSE);
  if (statistic == v1::STATISTIC_SALIENCY || statistic == v1::STATISTIC_SALIENCY_PER_KV_HEAD) {
    tensors.push_back(v1::TENSOR_SALIENCY);
  }
  if (scales > 0 && (!plan || queries)) tensors.push_back(v1::TENSOR_KEY_SCALES);
  if (scales > 0 && !plan && !open.geometry().values_in_keys()) {
    tensors.push_back(v1::TENSOR_VALUE_SCALES);
  }
}

PromptData::PromptData(const v1::Open& open, uint64_t seed) : open_(open), effective_(open) {
  rows_.resize(layers());
  tensors_.assign(layers(), std::vector<std::string>(v1::Tensor_MAX + 1));
  for (uint32_t layer = 0; layer < layers(); ++layer) {
    Random random(seed * 1000003 + layer);
    FillLayer(layer, &random);
    for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
      if (open.has_paged()) Page(layer, tensor, open.prompt_tokens(), /*in_order=*/false);
    }
    if (open.window_lse()) FillLse(layer);
  }
}

void PromptData::FillLayer(uint32_t layer, Random* random) {
  const v1::ModelGeometry& geometry = open_.geometry();
  const uint64_t tokens = open_.prompt_tokens();
  auto fill = [&](v1::Tensor tensor, uint64_t elements, int64_t span) {
    const v1::DType dtype =
        tensor == v1::TENSOR_WINDOW_QUERIES ? effective_.query_dtype : open_.dtype();
    std::string& out = tensors_[layer][tensor];
    out.reserve(elements * ElementBytes(dtype));
    for (uint64_t i = 0; i < elements; ++i) {
      AppendElement(dtype, static_cast<float>(random->Between(-span, span)) / 64, &out);
    }
  };
  if (effective_.layers[layer] == 0) return;
  for (v1::Tensor tensor : effective_.tensors) {
    switch (tensor) {
      case v1::TENSOR_KEYS:
        fill(tensor, geometry.kv_head_count() * tokens * geometry.key_dim(), 128);
        break;
      case v1::TENSOR_VALUES:
        fill(tensor, geometry.kv_head_count() * tokens * effective_.value_dim, 128);
        break;
      case v1::TENSOR_WINDOW_QUERIES:
        fill(tensor, uint64_t{geometry.query_head_count()} * effective_.window * geometry.key_dim(),
             32 * (1 + (layer * 3 + 1) % 4));
        break;
      case v1::TENSOR_KEY_SCALES:
      case v1::TENSOR_VALUE_SCALES:
        for (uint32_t i = 0; i < effective_.scales; ++i) {
          AppendElement(v1::DTYPE_F32, static_cast<float>(random->Between(8, 40)) / 24,
                        &tensors_[layer][tensor]);
        }
        break;
      case v1::TENSOR_WINDOW_LSE:  // later
        break;
      default: {  // saliency: many distinct values, some ties, a few heavy tokens
        const uint64_t rows =
            effective_.statistic == v1::STATISTIC_SALIENCY ? 1 : geometry.kv_head_count();
        const int64_t least = tokens < 4 ? 1 : 0;  // not 0 for every token
        for (uint64_t i = 0; i < rows * tokens; ++i) {
          const int64_t heavy = random->Chance(3) ? 64 * (1 + layer % 3) : 1;
          AppendElement(v1::DTYPE_F32,
                        static_cast<float>(random->Between(least, 255) * heavy) / 1024,
                        &tensors_[layer][tensor]);
        }
        break;
      }
    }
  }
}

const std::string& PromptData::tensor(uint32_t layer, v1::Tensor tensor) const {
  return tensors_[layer][tensor];
}

std::string* PromptData::mutable_tensor(uint32_t layer, v1::Tensor tensor) {
  return &tensors_[layer][tensor];
}

uint64_t PromptData::RowIndex(uint32_t layer, uint64_t head, uint64_t token) const {
  const uint64_t heads = open_.geometry().kv_head_count();
  if (!open_.has_paged()) return DenseRow(open_.layout(), heads, tokens(layer), head, token);
  const uint64_t size = open_.paged().block_tokens();
  const uint64_t block = rows_[layer].empty()
                             ? open_.paged().block_table(static_cast<int>(token / size))
                             : token / size;
  return PagedRow(open_.layout(), heads, size, block, head, token % size);
}

void PromptData::Page(uint32_t layer, v1::Tensor tensor, uint64_t tokens, bool in_order) {
  std::string& bytes = tensors_[layer][tensor];
  if (bytes.empty()) return;
  const uint64_t heads = open_.geometry().kv_head_count();
  const uint64_t size = open_.paged().block_tokens();
  const uint64_t row = bytes.size() / heads / tokens;
  const uint64_t blocks = in_order ? (tokens + size - 1) / size : open_.paged().block_count();
  std::string pool(blocks * size * heads * row, '\xff');  // NaN in every type
  for (uint64_t head = 0; head < heads; ++head) {
    for (uint64_t token = 0; token < tokens; ++token) {
      const uint64_t block =
          in_order ? token / size : open_.paged().block_table(static_cast<int>(token / size));
      pool.replace(PagedRow(open_.layout(), heads, size, block, head, token % size) * row, row,
                   bytes, DenseRow(open_.layout(), heads, tokens, head, token) * row, row);
    }
  }
  bytes = std::move(pool);
}

void PromptData::KeepRows(uint32_t layer, const std::vector<int32_t>& skeleton) {
  const uint64_t tokens = open_.prompt_tokens();
  const uint64_t heads = open_.geometry().kv_head_count();
  for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
    std::string& bytes = tensors_[layer][tensor];
    if (bytes.empty()) continue;
    const uint64_t row =
        ElementBytes(open_.dtype()) *
        (tensor == v1::TENSOR_KEYS ? open_.geometry().key_dim() : effective_.value_dim);
    std::string kept(heads * skeleton.size() * row, '\0');
    for (uint64_t head = 0; head < heads; ++head) {
      for (size_t i = 0; i < skeleton.size(); ++i) {
        kept.replace(DenseRow(open_.layout(), heads, skeleton.size(), head, i) * row, row, bytes,
                     RowIndex(layer, head, static_cast<uint64_t>(skeleton[i])) * row, row);
      }
    }
    bytes = kept;
    if (open_.has_paged()) Page(layer, tensor, skeleton.size(), /*in_order=*/true);
  }
  if (std::string& bytes = tensors_[layer][v1::TENSOR_SALIENCY]; !bytes.empty()) {
    const uint64_t rows = effective_.statistic == v1::STATISTIC_SALIENCY ? 1 : heads;
    std::string kept;
    for (uint64_t row = 0; row < rows; ++row) {
      for (const int32_t token : skeleton) kept += bytes.substr((row * tokens + token) * 4, 4);
    }
    bytes = kept;
  }
  std::string& positions = tensors_[layer][v1::TENSOR_POSITIONS];
  positions.assign(reinterpret_cast<const char*>(skeleton.data()), skeleton.size() * 4);
  rows_[layer] = skeleton;
  if (open_.window_lse()) FillLse(layer);
}

void PromptData::FillLse(uint32_t layer) {
  if (effective_.layers[layer] == 0 || effective_.statistic != v1::STATISTIC_WINDOW_QUERIES) return;
  std::string& lse = tensors_[layer][v1::TENSOR_WINDOW_LSE];
  lse.clear();
  for (const float value : WindowLse(*this, layer)) AppendElement(v1::DTYPE_F32, value, &lse);
}

void PromptData::KeepHeads(const v1::ShardGroup& group, uint32_t sharers) {
  const v1::ModelGeometry& geometry = open_.geometry();
  *open_.mutable_shard_group() = group;
  for (uint32_t layer = 0; layer < layers(); ++layer) {
    const auto keep = [&](v1::Tensor which, uint32_t runs_of_heads, uint32_t heads,
                          const v1::HeadRange& range) {
      std::string& bytes = tensors_[layer][which];
      bytes = SliceHeads(bytes, runs_of_heads, heads, range);
    };
    const uint32_t blocks = open_.has_paged() ? open_.paged().block_count() : 1;
    const uint32_t slots =
        open_.has_paged() ? blocks * open_.paged().block_tokens() : tokens(layer);
    const uint32_t rows = open_.layout() == v1::LAYOUT_HEAD_TOKEN_DIM ? blocks : slots;
    keep(v1::TENSOR_KEYS, rows, geometry.kv_head_count(), group.kv_heads());
    keep(v1::TENSOR_VALUES, rows, geometry.kv_head_count(), group.kv_heads());
    if (open_.kv_scales() == v1::KV_SCALES_PER_KV_HEAD) {
      keep(v1::TENSOR_KEY_SCALES, 1, geometry.kv_head_count(), group.kv_heads());
      keep(v1::TENSOR_VALUE_SCALES, 1, geometry.kv_head_count(), group.kv_heads());
    }
    keep(v1::TENSOR_WINDOW_QUERIES, 1, geometry.query_head_count(), group.query_heads());
    keep(v1::TENSOR_WINDOW_LSE, 1, geometry.query_head_count(), group.query_heads());
    if (effective_.statistic == v1::STATISTIC_SALIENCY_PER_KV_HEAD) {
      keep(v1::TENSOR_SALIENCY, 1, geometry.kv_head_count(), group.kv_heads());
    }
    std::string& saliency = tensors_[layer][v1::TENSOR_SALIENCY];
    if (saliency.empty()) continue;
    std::vector<float> values(saliency.size() / sizeof(float));
    std::memcpy(values.data(), saliency.data(), saliency.size());
    for (float& value : values) value /= static_cast<float>(sharers);
    saliency.assign(reinterpret_cast<const char*>(values.data()), saliency.size());
  }
}

std::string SliceHeads(const std::string& tensor, uint64_t runs, uint64_t heads,
                       const v1::HeadRange& range) {
  const uint64_t run = tensor.size() / runs;
  std::string slice;
  for (uint64_t i = 0; i < runs; ++i) {
    slice += tensor.substr(i * run + run / heads * range.begin(), run / heads * range.count());
  }
  return slice;
}

uint64_t PromptData::total_bytes() const {
  uint64_t bytes = 0;
  for (const auto& layer : tensors_) {
    for (const std::string& tensor : layer) bytes += tensor.size();
  }
  return bytes;
}

v1::TensorPiece MakePiece(const PromptData& data, uint32_t layer, v1::Tensor tensor,
                          uint64_t offset, uint64_t size) {
  v1::TensorPiece piece;
  piece.set_layer(layer);
  piece.set_tensor(tensor);
  piece.set_offset_bytes(offset);
  piece.set_data(data.tensor(layer, tensor).substr(offset, size));
  return piece;
}

v1::TensorPiece MakePiece(const PromptData& data, uint32_t layer, v1::Tensor tensor) {
  return MakePiece(data, layer, tensor, 0, data.tensor(layer, tensor).size());
}

std::vector<v1::TensorPiece> ChunkPieces(const PromptData& data, uint32_t layer, uint32_t first,
                                         uint32_t tokens) {
  const bool head_first = data.open().layout() == v1::LAYOUT_HEAD_TOKEN_DIM;
  const uint64_t runs = head_first ? data.open().geometry().kv_head_count() : 1;
  const uint64_t all = data.open().prompt_tokens();
  std::vector<v1::TensorPiece> pieces;
  for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
    const uint64_t row = data.tensor(layer, tensor).size() / runs / all;
    for (uint64_t run = 0; run < runs && row > 0; ++run) {
      pieces.push_back(MakePiece(data, layer, tensor, (run * all + first) * row, tokens * row));
    }
  }
  return pieces;
}

v1::CompressRequest OpenMessage(const v1::Open& open) {
  v1::CompressRequest request;
  *request.mutable_open() = open;
  return request;
}

v1::CompressRequest PieceMessage(v1::TensorPiece piece) {
  v1::CompressRequest request;
  *request.mutable_pieces()->add_pieces() = std::move(piece);
  return request;
}

v1::CompressRequest LayerMessage(const PromptData& data, uint32_t layer) {
  v1::CompressRequest request;
  if (!data.rows(layer).empty()) {
    *request.mutable_pieces()->add_pieces() = MakePiece(data, layer, v1::TENSOR_POSITIONS);
  }
  for (v1::Tensor tensor : data.effective().tensors) {
    if (data.effective().layers[layer] == 0) continue;
    *request.mutable_pieces()->add_pieces() = MakePiece(data, layer, tensor);
  }
  return request;
}

v1::CompressRequest CommitMessage(uint32_t layers, uint64_t bytes) {
  v1::CompressRequest request;
  request.mutable_commit()->set_layer_count(layers);
  request.mutable_commit()->set_input_bytes(bytes);
  return request;
}

v1::CompressRequest CommitMessage(const PromptData& data) {
  return CommitMessage(data.layers(), data.total_bytes());
}

std::vector<v1::CompressRequest> AllMessages(const PromptData& data) {
  std::vector<v1::CompressRequest> messages = {OpenMessage(data.open())};
  for (uint32_t layer = 0; layer < data.layers(); ++layer) {
    v1::CompressRequest message = LayerMessage(data, layer);
    if (message.has_pieces()) messages.push_back(std::move(message));  // none: nothing is due
  }
  messages.push_back(CommitMessage(data));
  return messages;
}

}  // namespace structkv::testkit
