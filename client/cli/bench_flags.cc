#include "client/cli/bench_flags.h"

#include <random>

#include "absl/strings/str_cat.h"
#include "client/cli/shared_memory.h"
#include "client/cli/synthetic.h"

namespace structkv::cli {

void AddBenchFlags(CLI::App* app, BenchFlags* flags) {
  constexpr char kPrompt[] = "Prompt";
  constexpr char kRun[] = "Run";
  app->add_option("--geometry", flags->geometry, "A known model's")
      ->check(CLI::IsMember(GeometryNames()))
      ->capture_default_str()
      ->group(kPrompt);
  app->add_option("--layers", flags->layers, "In place of the geometry's")->group(kPrompt);
  app->add_option("--query-heads", flags->query_heads, "Likewise")->group(kPrompt);
  app->add_option("--kv-heads", flags->kv_heads, "Likewise")->group(kPrompt);
  app->add_option("--dim", flags->dim, "Head size of keys and values, likewise")->group(kPrompt);
  app->add_option("--value-dim", flags->value_dim, "Head size of values, likewise")->group(kPrompt);
  app->add_flag("--values-in-keys", flags->values_in_keys,
                "Values are the first elements of the keys, as in MLA")
      ->group(kPrompt);
  app->add_option("--attention-scale", flags->attention_scale,
                  "Factor of the scores, in place of the geometry's")
      ->group(kPrompt);
  app->add_option("--tokens", flags->tokens, "Prompt length")
      ->capture_default_str()
      ->group(kPrompt);
  app->add_option("--dtype", flags->dtype,
                  "bf16, f16, f32, f8-e4m3 or f8-e5m2; fp8 has queries of bf16")
      ->check(CLI::IsMember({"bf16", "f16", "f32", "f8-e4m3", "f8-e5m2"}))
      ->capture_default_str()
      ->group(kPrompt);
  app->add_option("--kv-scales", flags->kv_scales, "Of fp8: none, per-tensor or per-kv-head")
      ->check(CLI::IsMember({"none", "per-tensor", "per-kv-head"}))
      ->capture_default_str()
      ->group(kPrompt);
  app->add_option("--layout", flags->layout, "head-token-dim or token-head-dim")
      ->check(CLI::IsMember({"head-token-dim", "token-head-dim"}))
      ->capture_default_str()
      ->group(kPrompt);
  app->add_option("--paged", flags->paged,
                  "Tokens of a block: keys and values lie in blocks, in random order; 0: they are "
                  "dense")
      ->capture_default_str()
      ->group(kPrompt);
  app->add_option("--statistic", flags->statistic,
                  "What is sent for scoring: window-queries (default), saliency or "
                  "saliency-per-kv-head (h2o's default)")
      ->check(CLI::IsMember({"window-queries", "saliency", "saliency-per-kv-head"}))
      ->group(kPrompt);
  CLI::Option* plan = app->add_flag("--plan", flags->plan, "Positions only")->group(kPrompt);
  app->add_flag("--pull", flags->pull,
                "Send only the rows of values that the service asks for; with saliency also those "
                "of keys")
      ->excludes(plan)
      ->group(kPrompt);
  app->add_flag("--hold", flags->hold,
                "Leave compacted caches in the server, then fetch and release each")
      ->excludes(plan)
      ->group(kPrompt);
  app->add_flag("--bytes", flags->bytes,
                "Print what each mode moves for this geometry, and measure nothing")
      ->group(kPrompt);
  app->add_option("--seed", flags->seed, "Seed of the random tensors")
      ->capture_default_str()
      ->group(kPrompt);
  app->add_option("--prompts", flags->prompts, "Prompts in all")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str()
      ->group(kRun);
  app->add_option("--concurrency", flags->concurrency, "Prompts, or batches of them, at a time")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str()
      ->group(kRun);
  app->add_option("--batch", flags->batch,
                  "Prompts in one stream: the first has --tokens, the others between a quarter of "
                  "that and all of it")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str()
      ->group(kRun);
  app->add_option("--shards", flags->shards,
                  "Tensor-parallel ranks of each prompt, each a stream of its own")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str()
      ->group(kRun);
  app->add_option("--layers-in-flight", flags->layers_in_flight,
                  "Layers that may be unfinished at once; 0: the service's default")
      ->capture_default_str()
      ->group(kRun);
  app->add_option("--chunk-kib", flags->chunk_kib, "Tensor bytes per message, KiB")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str()
      ->group(kRun);
  app->add_flag("--checksums", flags->checksums, "Send a checksum with every piece")->group(kRun);
  AddMethodFlags(app, &flags->method);
  AddRotaryFlags(app, &flags->rotary);
  AddConnectionFlags(app, &flags->connection);
  AddTransportFlag(app, &flags->connection);
  app->add_flag("--json", flags->json, "Print JSON");
}

absl::Status CheckBenchFlags(const BenchFlags& flags) {
  if (flags.connection.in_process && flags.shards > 1) {
    return absl::InvalidArgumentError("--shards needs a server: each rank is a stream of its own");
  }
  if (flags.connection.in_process && flags.batch > 1) {
    return absl::InvalidArgumentError("--batch needs a server: its prompts share a stream");
  }
  if (flags.connection.in_process && flags.hold) {
    return absl::InvalidArgumentError("--hold needs a server: it is where caches are held");
  }
  if (flags.shards > 1 && flags.batch > 1) {
    return absl::InvalidArgumentError(absl::StrCat("--batch ", flags.batch, " and --shards ",
                                                   flags.shards,
                                                   ": only one of both can be above 1"));
  }
  return absl::OkStatus();
}

std::vector<uint32_t> BatchTokens(const BenchFlags& flags) {
  std::vector<uint32_t> tokens = {flags.tokens};
  std::mt19937_64 random(flags.seed);
  const uint32_t shortest = (flags.tokens + 3) / 4;
  while (tokens.size() < flags.batch) {
    tokens.push_back(shortest + static_cast<uint32_t>(random() % (flags.tokens - shortest + 1)));
  }
  return tokens;
}

namespace {

// What `method` is sent for scoring; INVALID_ARGUMENT where it cannot be what the flags say.
absl::StatusOr<v1::Statistic> BenchStatistic(const BenchFlags& flags, const v1::Method& method) {
  const std::string given = flags.statistic.value_or("");
  if (method.has_streaming_llm() || method.has_full()) {
    if (given.empty()) return v1::STATISTIC_NONE;
    return absl::InvalidArgumentError(
        absl::StrCat("--statistic ", given, ": ", flags.method.method, " scores nothing"));
  }
  if (method.has_h2o() && given == "window-queries") {
    return absl::InvalidArgumentError(absl::StrCat(
        "--statistic ", given, ": h2o needs saliency or saliency-per-kv-head, of all queries"));
  }
  if (given == "saliency") return v1::STATISTIC_SALIENCY;
  return given == "saliency-per-kv-head" || method.has_h2o() ? v1::STATISTIC_SALIENCY_PER_KV_HEAD
                                                             : v1::STATISTIC_WINDOW_QUERIES;
}

}  // namespace

absl::StatusOr<v1::Open> MakeBenchOpen(const BenchFlags& flags, uint32_t tokens) {
  absl::StatusOr<KnownModel> known = ModelByName(flags.geometry);
  if (!known.ok()) return known.status();
  v1::ModelGeometry* geometry = &known->geometry;
  if (flags.layers) geometry->set_layer_count(*flags.layers);
  if (flags.query_heads) geometry->set_query_head_count(*flags.query_heads);
  if (flags.kv_heads) geometry->set_kv_head_count(*flags.kv_heads);
  if (flags.dim) {
    geometry->set_key_dim(*flags.dim);
    geometry->set_value_dim(*flags.dim);
  }
  if (flags.value_dim) geometry->set_value_dim(*flags.value_dim);
  if (flags.values_in_keys) geometry->set_values_in_keys(true);
  absl::StatusOr<v1::Method> method = BuildMethod(flags.method);
  if (!method.ok()) return method.status();
  v1::Open open;
  *open.mutable_geometry() = *geometry;
  if (known->attention_scale) open.set_attention_scale(*known->attention_scale);
  if (flags.attention_scale) open.set_attention_scale(*flags.attention_scale);
  *open.mutable_method() = *std::move(method);
  open.set_prompt_tokens(tokens);
  open.set_dtype(flags.dtype == "f32"       ? v1::DTYPE_F32
                 : flags.dtype == "f16"     ? v1::DTYPE_F16
                 : flags.dtype == "f8-e4m3" ? v1::DTYPE_F8_E4M3
                 : flags.dtype == "f8-e5m2" ? v1::DTYPE_F8_E5M2
                                            : v1::DTYPE_BF16);
  if (flags.kv_scales != "none") {
    open.set_kv_scales(flags.kv_scales == "per-tensor" ? v1::KV_SCALES_PER_TENSOR
                                                       : v1::KV_SCALES_PER_KV_HEAD);
  }
  open.set_layout(flags.layout == "token-head-dim" ? v1::LAYOUT_TOKEN_HEAD_DIM
                                                   : v1::LAYOUT_HEAD_TOKEN_DIM);
  if (flags.paged != 0) PageAtRandom(flags.paged, flags.seed, &open);
  const absl::StatusOr<v1::Statistic> statistic = BenchStatistic(flags, open.method());
  if (!statistic.ok()) return statistic.status();
  open.set_statistic(*statistic);
  open.set_output(flags.plan || open.method().has_gemfilter() ? v1::OUTPUT_PLAN
                  : flags.hold                                ? v1::OUTPUT_HOLD
                                                              : v1::OUTPUT_COMPACT);
  SetRotary(flags.rotary, /*metadata=*/{}, &open);
  if (flags.pull) {
    open.set_pull(open.statistic() == v1::STATISTIC_WINDOW_QUERIES ? v1::PULL_VALUES
                                                                   : v1::PULL_KEYS_AND_VALUES);
  }
  open.set_layers_in_flight(flags.layers_in_flight);
  open.set_model_id(absl::StrCat("bench/", flags.geometry));
  return open;
}

}  // namespace structkv::cli
