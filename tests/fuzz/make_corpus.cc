// Writes the first inputs of every fuzz target: make_corpus DIRECTORY
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "structkv/sizes.h"
#include "tests/proto/wire_testing.h"
#include "tests/rpc/open_messages.h"

namespace structkv::fuzz {
namespace {

using testkit::Random;

class Corpus {
 public:
  explicit Corpus(std::filesystem::path root) : root_(std::move(root)) {}

  void Add(const std::string& target, const std::string& name, const std::string& input) const {
    std::filesystem::create_directories(root_ / target);
    std::ofstream(root_ / target / name, std::ios::binary) << input;
  }

 private:
  const std::filesystem::path root_;
};

std::string Number(size_t i) { return std::to_string(i); }

// Short enough to be mutated well.
template <typename Pieces>
void Shorten(Pieces* pieces) {
  for (v1::TensorPiece& piece : *pieces) {
    if (piece.data().size() > 40) piece.mutable_data()->resize(40);
  }
}

// The end of one prompt of a batch.
v1::CompressResponse Failed() {
  v1::CompressResponse response;
  response.set_prompt(1);
  response.mutable_failed()->set_code(8);
  response.mutable_failed()->set_message("the budget is taken");
  response.mutable_failed()->set_retry_after_millis(250);
  return response;
}

void AddWire(const Corpus& corpus) {
  Random random(5);
  const std::string cuts("\x03\x01\x07\x1e", 4);
  for (size_t i = 0; i < 6; ++i) {
    v1::CompressRequest request = wire::testing::RandomPieces(&random);
    Shorten(request.mutable_pieces()->mutable_pieces());
    corpus.Add("decode_request", "pieces" + Number(i), cuts + request.SerializeAsString());
  }
  v1::CompressRequest commit;
  commit.mutable_commit()->set_layer_count(32);
  corpus.Add("decode_request", "commit", cuts + commit.SerializeAsString());
  v1::CompressRequest open;
  *open.mutable_open() = rpc::ValidOpen();
  corpus.Add("decode_request", "open", std::string(1, '\0') + open.SerializeAsString());
  v1::CompressRequest pieces;
  pieces.mutable_pieces()->add_pieces()->set_data("data");
  // Both members of a piece's source, in turn: the last one holds, and ranges are merged.
  v1::TensorPiece data;
  data.set_data("data");
  v1::TensorPiece place;
  place.mutable_range()->set_region(1);
  place.mutable_range()->set_offset_bytes(uint64_t{1} << 63);
  v1::TensorPiece size;
  size.mutable_range()->set_size_bytes(4096);
  std::string pieces_of_ranges;
  for (const auto& sources : {std::vector{place, size}, std::vector{data, place},
                              std::vector{place, data}, std::vector{place, data, size}}) {
    std::string piece;
    for (const v1::TensorPiece& source : sources) piece += source.SerializeAsString();
    pieces_of_ranges += std::string({'\x0a', static_cast<char>(piece.size())}) + piece;
  }
  const std::string ranges =
      std::string({'\x12', static_cast<char>(pieces_of_ranges.size())}) + pieces_of_ranges;
  corpus.Add("decode_request", "ranges", cuts + ranges);
  v1::CompressRequest of_batch = open;
  of_batch.set_prompt(3);
  of_batch.mutable_open()->set_batch_prompt_count(4);
  corpus.Add("decode_request", "open_of_batch",
             std::string(1, '\0') + of_batch.SerializeAsString());
  of_batch = pieces;
  of_batch.set_prompt(1000);
  corpus.Add("decode_request", "pieces_of_batch", cuts + of_batch.SerializeAsString());
  // The prompt may come before what is of it, and more than once.
  v1::CompressRequest prompt;
  prompt.set_prompt(2);
  corpus.Add("decode_request", "prompt_first",
             cuts + prompt.SerializeAsString() + commit.SerializeAsString());
  corpus.Add("decode_request", "prompt_twice",
             cuts + of_batch.SerializeAsString() + prompt.SerializeAsString());
  corpus.Add("decode_request", "members",
             cuts + open.SerializeAsString() + pieces.SerializeAsString() +
                 commit.SerializeAsString() + pieces.SerializeAsString());
  for (size_t i = 0; i < 12; ++i) {
    v1::CompressResponse response = wire::testing::RandomResponse(&random);
    if (response.has_layer()) Shorten(response.mutable_layer()->mutable_pieces());
    if (response.has_pivot()) Shorten(response.mutable_pivot()->mutable_pieces());
    if (response.has_pull()) Shorten(response.mutable_pull()->mutable_pieces());
    corpus.Add("decode_response", "response" + Number(i), cuts + response.SerializeAsString());
    response.set_prompt(static_cast<uint32_t>(i) + 1);
    corpus.Add("decode_response", "of_batch" + Number(i), cuts + response.SerializeAsString());
  }
  corpus.Add("decode_response", "failed", cuts + Failed().SerializeAsString());
  for (size_t i = 0; i < 8; ++i) {
    v1::FetchCacheResponse response = wire::testing::RandomFetchResponse(&random);
    if (response.has_layer()) Shorten(response.mutable_layer()->mutable_pieces());
    corpus.Add("decode_fetch", "response" + Number(i), cuts + response.SerializeAsString());
  }
}

void AddOpen(const Corpus& corpus) {
  v1::Open open = rpc::ValidOpen();
  corpus.Add("open", "defaults", open.SerializeAsString());
  open.mutable_geometry()->set_value_dim(32);
  open.set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
  open.set_return_saliency(true);
  open.set_return_centrality(true);
  open.set_layers_in_flight(8);
  open.set_idempotency_key("key");
  open.set_model_id("model");
  v1::StructKvMethod* structkv = open.mutable_method()->mutable_structkv();
  structkv->mutable_kv_budget()->set_ratio(0.3);
  structkv->mutable_kv_budget()->set_kind(v1::BUDGET_KIND_WINDOW_ON_TOP);
  structkv->set_window_tokens(16);
  structkv->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
  structkv->set_pooling(v1::POOLING_MAX);
  structkv->set_pooling_kernel(7);
  structkv->set_decay(0.5);
  structkv->mutable_skeleton_budget()->set_ratio(0.4);
  structkv->mutable_pivot()->set_mode(v1::PIVOT_MODE_FIXED);
  structkv->mutable_pivot()->set_fixed_layer(3);
  structkv->mutable_pivot()->set_search_begin(0.1);
  corpus.Add("open", "structkv", open.SerializeAsString());
  open = rpc::ValidOpen();
  open.mutable_geometry()->set_kv_head_count(1);
  open.mutable_geometry()->set_value_dim(48);
  open.mutable_geometry()->set_values_in_keys(true);
  open.set_attention_scale(0.2);
  corpus.Add("open", "values_in_keys", open.SerializeAsString());
  open = rpc::ValidOpen();
  open.set_dtype(v1::DTYPE_F8_E4M3);
  open.set_query_dtype(v1::DTYPE_F16);
  open.set_kv_scales(v1::KV_SCALES_PER_KV_HEAD);
  corpus.Add("open", "fp8", open.SerializeAsString());
  open = rpc::ValidOpen();
  open.set_prompt_tokens(100);
  open.mutable_paged()->set_block_tokens(32);
  open.mutable_paged()->set_block_count(6);
  for (const uint32_t block : {5U, 0U, 3U, 2U}) open.mutable_paged()->add_block_table(block);
  corpus.Add("open", "paged", open.SerializeAsString());
  open = rpc::ValidOpen();
  open.mutable_shard_group()->set_group_id("group");
  open.mutable_shard_group()->set_shard_count(2);
  open.mutable_shard_group()->set_shard_index(1);
  open.set_batch_prompt_count(3);
  corpus.Add("open", "shard_group", open.SerializeAsString());
  const v1::ModelGeometry& geometry = open.geometry();
  open.mutable_shard_group()->mutable_kv_heads()->set_begin(1);
  open.mutable_shard_group()->mutable_kv_heads()->set_count(geometry.kv_head_count() - 1);
  const uint32_t group = geometry.query_head_count() / geometry.kv_head_count();
  open.mutable_shard_group()->mutable_query_heads()->set_begin(group);
  open.mutable_shard_group()->mutable_query_heads()->set_count(geometry.query_head_count() - group);
  open.mutable_shard_group()->set_decode_shard_count(2);
  corpus.Add("open", "uneven_shard_group", open.SerializeAsString());
  open = rpc::ValidOpen();
  open.mutable_method()->mutable_snapkv()->set_pooling(v1::POOLING_NONE);
  open.set_window_lse(true);
  open.set_output(v1::OUTPUT_PLAN);
  corpus.Add("open", "snapkv", open.SerializeAsString());
  open = rpc::ValidOpen();
  open.mutable_method()->mutable_streaming_llm()->set_sink_tokens(8);
  corpus.Add("open", "streaming_llm", open.SerializeAsString());
  open.mutable_method()->mutable_full();
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  open.set_dtype(v1::DTYPE_F32);
  corpus.Add("open", "full", open.SerializeAsString());
  open = rpc::ValidOpen();
  open.mutable_method()->mutable_pyramidkv()->set_beta(3);
  corpus.Add("open", "pyramidkv", open.SerializeAsString());
  open.mutable_method()->mutable_fastkv()->set_tsp_layer(5);
  open.mutable_method()->mutable_fastkv()->set_window_reduce(v1::WINDOW_REDUCE_SUM);
  open.mutable_method()->mutable_fastkv()->set_group_reduce(v1::GROUP_REDUCE_MAX);
  corpus.Add("open", "fastkv", open.SerializeAsString());
  open.mutable_method()->mutable_structkv()->mutable_pivot()->set_mode(v1::PIVOT_MODE_ONLINE);
  open.mutable_method()->mutable_structkv()->mutable_pivot()->set_patience(3);
  open.mutable_method()->mutable_structkv()->mutable_pivot()->set_confirm_score(0.25);
  corpus.Add("open", "online", open.SerializeAsString());
  open.mutable_method()->mutable_h2o()->set_recent_share(0.25);
  corpus.Add("open", "h2o", open.SerializeAsString());
  open.mutable_method()->mutable_gemfilter()->set_filter_layer(2);
  open.set_output(v1::OUTPUT_PLAN);
  corpus.Add("open", "gemfilter", open.SerializeAsString());
  open = rpc::ValidOpen();
  open.mutable_rotary()->set_rope_theta(500000);
  open.mutable_rotary()->set_rope_type(v1::ROPE_TYPE_YARN);
  open.mutable_rotary()->set_factor(4);
  open.mutable_rotary()->set_original_max_position_embeddings(4096);
  open.mutable_rotary()->set_beta_fast(16);
  open.mutable_rotary()->set_pairing(v1::ROTARY_PAIRING_INTERLEAVED);
  open.mutable_rotary()->set_rotary_dim(16);
  open.mutable_rotary()->set_rotary_offset(8);
  corpus.Add("open", "rotary", open.SerializeAsString());
  open = rpc::ValidOpen();
  open.mutable_method()->mutable_full();
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  open.set_dtype(v1::DTYPE_F32);
  open.set_prompt_tokens(1 << 20);
  open.mutable_geometry()->set_layer_count(512);
  open.mutable_geometry()->set_query_head_count(1024);
  open.mutable_geometry()->set_kv_head_count(1024);
  open.mutable_geometry()->set_key_dim(576);
  corpus.Add("open", "largest", open.SerializeAsString());
}

void AddAssemblers(const Corpus& corpus) {
  // Layers 2, value_dim 2, tokens 2, StructKV, in flight 2; then keys, values and queries of each
  // layer, whole, with the layer popped and done. A piece: op, layer, tensor, offset, size, cut.
  const std::string head("\x01\x01\x01\x00\x01", 5);
  std::string whole = head;
  for (char layer : {0, 1}) {
    whole += std::string{2, layer, 0, 0, 8, 3} + std::string{18, layer, 1, 0, 4, 0} +
             std::string{2, layer, 1, 4, 4, 1} + std::string{2, layer, 2, 0, 16, 9} +
             std::string{8, 1};
  }
  corpus.Add("layer_assembler", "whole", whole);
  corpus.Add("layer_assembler", "again", whole + whole.substr(5));
  corpus.Add("layer_assembler", "overlap", head + std::string{2, 0, 0, 0, 5, 0, 2, 0, 0, 3, 3, 0});
  corpus.Add("layer_assembler", "plan", std::string("\x02\x01\x01\x09\x01\x08\x01\x08\x01", 9));
  corpus.Add("layer_assembler", "checksum", head + std::string{114, 0, 0, 0, 8, 0});

  // Layers 2, value_dim 2, tokens 4, skeleton rows, in flight 2; layer 0 whole, the skeleton of two
  // tokens from layer 1 on, then layer 1 as its rows: positions in two pieces, and all else.
  const std::string skeleton_head("\x01\x01\x03\x10\x01", 5);
  const std::string first = skeleton_head + std::string{2, 0, 0, 0, 16, 3} +
                            std::string{2, 0, 1, 0, 16, 0} + std::string{2, 0, 2, 0, 8, 1} +
                            std::string{8, 1, 7, 1, 1};
  const std::string positions = std::string{2, 1, 5, 0, 3, 1} + std::string{18, 1, 5, 3, 5, 0};
  const std::string rest = std::string{2, 1, 0, 0, 8, 0} + std::string{2, 1, 1, 0, 8, 0} +
                           std::string{2, 1, 2, 0, 8, 0} + std::string{8, 1};
  corpus.Add("layer_assembler", "skeleton", first + positions + rest);
  corpus.Add("layer_assembler", "skeleton_again", first + positions + rest + positions);
  corpus.Add("layer_assembler", "skeleton_mixed", first + rest.substr(0, 6) + positions);
  corpus.Add("layer_assembler", "skeleton_early", skeleton_head + positions);
  corpus.Add("layer_assembler", "skeleton_keys_first",
             first + positions.substr(0, 6) + rest.substr(0, 6));
  corpus.Add("layer_assembler", "skeleton_wrong", first + std::string{'\x82', 1, 5, 0, 8, 0});

  // The first prompt over shared memory: keys and values as whole ranges, queries either way. A
  // range: op, layer, tensor, offset, three that do not count, 64 bytes for each 16 of the last
  // one.
  const std::string shared_head("\x01\x01\x01\x20\x01", 5);
  const auto range = [](char op, char layer, char tensor, char at) {
    return std::string{op, layer, tensor, 0, 0, 0, 0, at};
  };
  std::string shared = shared_head;
  for (char layer : {0, 1}) {
    shared += range(10, layer, 0, 32) + range(10, layer, 1, 64);
    shared += layer == 0 ? range(10, layer, 2, 16) : std::string{2, layer, 2, 0, 16, 9};
    shared += std::string{8, 1};
  }
  corpus.Add("layer_assembler", "shared", shared);
  corpus.Add("layer_assembler", "shared_again", shared + range(10, 0, 0, 32));
  corpus.Add("layer_assembler", "shared_elsewhere", shared + range(10, 0, 0, 48));
  corpus.Add("layer_assembler", "shared_checksum", shared_head + range(26, 0, 0, 32));
  corpus.Add("layer_assembler", "shared_data", shared_head + whole.substr(5));
  corpus.Add("layer_assembler", "shared_odd",
             shared_head + std::string{'\xca', 0, 0, 0, 8, 0, 0, 0, 8});

  std::string pieces("\xff\x00", 2);
  for (int i = 0; i < 20; ++i) pieces += std::string{static_cast<char>(16 + 10 * i), 0, 10};
  corpus.Add("piece_map", "row", pieces);
  corpus.Add("piece_map", "again", pieces + pieces.substr(2));
  corpus.Add("piece_map", "overlap", pieces.substr(0, 11) + std::string{18, 0, 3, 14, 0, 3});
  std::string many("\xff\xff", 2);
  for (int i = 0; i < 1040; ++i) {
    many += std::string{static_cast<char>(16 + i), static_cast<char>((16 + i) >> 8), 1};
  }
  corpus.Add("piece_map", "too_many", many);
}

std::string Framed(const v1::CompressResponse& message) {
  const std::string bytes = message.SerializeAsString();
  return std::string{static_cast<char>(bytes.size()), static_cast<char>(bytes.size() >> 8)} + bytes;
}

// A server's messages in answer to the target's `open`.
std::string Answers(bool plan, bool on_request, bool pull = false) {
  v1::CompressResponse opened;
  v1::Opened* out = opened.mutable_opened();
  out->mutable_method()->mutable_structkv();
  for (int layer = 0; layer < 2; ++layer) out->add_kept_tokens(2);
  out->set_skeleton_tokens(3);
  out->set_statistic(v1::STATISTIC_WINDOW_QUERIES);
  std::string messages = Framed(opened);
  uint64_t bytes = 0;
  const auto add = [&](v1::TensorPiece* piece, uint32_t layer, v1::Tensor tensor, size_t size) {
    piece->set_layer(layer);
    piece->set_tensor(tensor);
    piece->set_data(std::string(size, '\0'));
    bytes += size;
  };
  for (uint32_t layer = 0; layer < 2 && pull; ++layer) {
    v1::CompressResponse response;
    response.mutable_pull()->set_layer(layer);
    response.mutable_pull()->set_kept_tokens(2);
    response.mutable_pull()->add_tensors(v1::TENSOR_VALUES);
    response.mutable_pull()->set_complete(true);
    add(response.mutable_pull()->add_pieces(), layer, v1::TENSOR_POSITIONS, 8);
    messages += Framed(response);
  }
  for (uint32_t layer = 0; layer < 2; ++layer) {
    v1::CompressResponse response;
    v1::LayerResult* result = response.mutable_layer();
    result->set_layer(layer);
    result->set_kept_tokens(2);
    add(result->add_pieces(), layer, v1::TENSOR_POSITIONS, 8);
    if (!plan) {
      add(result->add_pieces(), layer, v1::TENSOR_KEYS, 16);
      messages += Framed(response);
      result->clear_pieces();
      add(result->add_pieces(), layer, v1::TENSOR_VALUES, 16);
    }
    if (on_request) add(result->add_pieces(), layer, v1::TENSOR_SALIENCY, 32);
    result->set_complete(true);
    messages += Framed(response);
  }
  v1::CompressResponse pivot;
  pivot.mutable_pivot()->set_pivot_layer(1);
  add(pivot.mutable_pivot()->add_pieces(), 1, v1::TENSOR_SKELETON_POSITIONS, 12);
  if (on_request) add(pivot.mutable_pivot()->add_pieces(), 1, v1::TENSOR_CENTRALITY, 32);
  pivot.mutable_pivot()->set_complete(true);
  messages += Framed(pivot);
  v1::CompressResponse summary;
  summary.mutable_summary()->set_layer_count(2);
  summary.mutable_summary()->set_input_bytes(1000);
  summary.mutable_summary()->set_output_bytes(bytes);
  summary.mutable_summary()->set_logical_length(8);
  summary.mutable_summary()->set_kv_length(2);
  summary.mutable_summary()->set_next_position(8);
  return messages + Framed(summary);
}

void AddTexts(const Corpus& corpus) {
  const auto safetensors = [](const std::string& header, size_t data) {
    std::string length(8, '\0');
    length[0] = static_cast<char>(header.size());
    length[1] = static_cast<char>(header.size() >> 8);
    return length + header + std::string(data, 'd');
  };
  corpus.Add("safetensors", "empty", safetensors("{}", 0));
  corpus.Add("safetensors", "one",
             safetensors(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})", 24));
  corpus.Add("safetensors", "two",
             safetensors(R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[4],)"
                         R"("data_offsets":[8,16]},"a":{"dtype":"I64","shape":[],)"
                         R"("data_offsets":[0,8]}})",
                         16));
  corpus.Add("safetensors", "large_shape",
             safetensors(R"({"a":{"dtype":"U8","shape":[4294967296,4294967296],)"
                         R"("data_offsets":[0,0]}})",
                         0));
  corpus.Add(
      "safetensors", "deep",
      safetensors(R"({"a":{"dtype":)" + std::string(300, '[') + std::string(300, ']') + "}}", 0));
  corpus.Add("yaml_config", "values", "threads: 8\nmemory-budget: 8GiB\nbackend: cpu\n");
  corpus.Add("yaml_config", "lists", "listen: ['127.0.0.1:0', \"unix:/a\"]\n");
  corpus.Add("yaml_config", "block", "listen:\n  - a\n  - b\n# done\nthreads: |\n  8\n");
  corpus.Add("yaml_config", "anchors", "threads: &a 8\nmemory-budget: *a\n");
  corpus.Add("yaml_config", "documents", "---\nthreads: 8\n...\n---\nthreads: 9\n");
  corpus.Add("yaml_config", "unknown", "thread: 8\n");
  corpus.Add("yaml_config", "nested", "threads: {a: [1, {b: c}]}\n? [1]\n: 2\n");
  corpus.Add("yaml_config", "escapes", "threads: \"\\x41\\u263a\\n\"\n%TAG ! tag:a,b:\n");
}

}  // namespace
}  // namespace structkv::fuzz

int main(int argc, char** argv) {
  if (argc != 2 || argv[1][0] == '-') {
    std::fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
    return 2;
  }
  const structkv::fuzz::Corpus corpus(argv[1]);
  structkv::fuzz::AddWire(corpus);
  structkv::fuzz::AddOpen(corpus);
  structkv::fuzz::AddAssemblers(corpus);
  for (int flags = 0; flags < 8; ++flags) {
    const bool on_request = (flags & 3) == 3;
    if ((flags & 3) != 0 && !on_request) continue;
    corpus.Add("client_assembler", "answers" + std::to_string(flags),
               static_cast<char>(flags) + structkv::fuzz::Answers((flags & 4) != 0, on_request));
  }
  corpus.Add("client_assembler", "answers8",
             '\x08' + structkv::fuzz::Answers(/*plan=*/false, /*on_request=*/false, /*pull=*/true));
  corpus.Add("client_assembler", "failed",
             std::string(1, '\0') + structkv::fuzz::Framed(structkv::fuzz::Failed()));
  structkv::fuzz::AddTexts(corpus);
  return 0;
}
