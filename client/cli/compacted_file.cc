#include "client/cli/compacted_file.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/capture.h"
#include "client/cli/method_flags.h"
#include "structkv/held_cache.h"
#include "structkv/sizes.h"

namespace structkv::cli {
namespace {

std::string Name(uint32_t layer, const char* suffix) {
  return absl::StrCat("layer.", layer, ".", suffix);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CompactedFile>> CompactedFile::Create(
    const std::string& path, const v1::Open& open, const v1::Opened& opened,
    std::map<std::string, std::string> metadata) {
  return Create(path, open, opened, std::move(metadata),
                {.end_layer = open.geometry().layer_count()});
}

absl::StatusOr<std::unique_ptr<CompactedFile>> CompactedFile::Create(const std::string& path,
                                                                     const v1::CacheInfo& info) {
  return Create(path, client::OpenOf(info), client::OpenedOf(info), {},
                {.first_layer = info.first_layer(),
                 .end_layer = info.first_layer() + info.layer_count(),
                 .pivot = false});
}

absl::StatusOr<std::unique_ptr<CompactedFile>> CompactedFile::Create(
    const std::string& path, const v1::Open& open, const v1::Opened& opened,
    std::map<std::string, std::string> metadata, const Parts& parts) {
  std::unique_ptr<CompactedFile> file(new CompactedFile());
  const v1::ModelGeometry& geometry = open.geometry();
  const uint32_t layers = geometry.layer_count();
  const int64_t heads = geometry.kv_head_count();
  const int64_t tokens = open.prompt_tokens();
  const bool per_head =
      client::EffectiveGranularity(opened.method()) == v1::GRANULARITY_PER_KV_HEAD;
  file->has_metrics_ = opened.statistic() != v1::STATISTIC_NONE;
  file->has_transition_ = parts.pivot && opened.method().has_structkv();
  file->has_pivot_ =
      parts.pivot && (opened.method().has_structkv() || opened.method().has_fastkv() ||
                      opened.method().has_gemfilter());
  file->return_saliency_ = open.return_saliency() && file->has_metrics_;
  file->return_centrality_ = open.return_centrality() && file->has_transition_;
  file->plan_ = open.output() == v1::OUTPUT_PLAN;
  file->values_in_keys_ = geometry.values_in_keys();

  const v1::KvScales scales = file->plan_ ? v1::KV_SCALES_NONE : open.kv_scales();
  file->key_scales_ = scales == v1::KV_SCALES_PER_TENSOR || scales == v1::KV_SCALES_PER_KV_HEAD;
  file->value_scales_ = file->key_scales_ && !file->values_in_keys_;
  const int64_t scale_count = scales == v1::KV_SCALES_PER_TENSOR ? 1 : heads;

  // Tensors of four-byte elements come first, so that every tensor is aligned.
  std::vector<TensorDeclaration> tensors;
  if (file->has_metrics_) {
    for (const char* name : {"metrics.entropy", "metrics.sparsity", "metrics.variance"}) {
      tensors.push_back({name, "F32", {layers}});
    }
  }
  if (file->has_transition_) tensors.push_back({"metrics.transition", "F32", {layers}});
  if (file->has_pivot_) {
    tensors.push_back({"skeleton.positions", "I32", {opened.skeleton_tokens()}});
  }
  if (file->return_centrality_) tensors.push_back({"centrality", "F32", {tokens}});
  for (uint32_t layer = parts.first_layer; layer < parts.end_layer; ++layer) {
    const int64_t kept = opened.kept_tokens(static_cast<int>(layer));
    std::vector<int64_t> positions = {kept};
    std::vector<int64_t> saliency = {tokens};
    if (per_head) {
      positions.insert(positions.begin(), heads);
      saliency.insert(saliency.begin(), heads);
    }
    tensors.push_back({Name(layer, "positions"), "I32", positions});
    if (file->return_saliency_ && kept > 0)
      tensors.push_back({Name(layer, "saliency"), "F32", saliency});
    if (file->key_scales_) tensors.push_back({Name(layer, "k_scale"), "F32", {scale_count}});
    if (file->value_scales_) tensors.push_back({Name(layer, "v_scale"), "F32", {scale_count}});
  }
  const std::string dtype(SafetensorsName(open.dtype()));
  for (uint32_t layer = parts.first_layer; layer < parts.end_layer && !file->plan_; ++layer) {
    const int64_t kept = opened.kept_tokens(static_cast<int>(layer));
    const int64_t value_dim = geometry.value_dim() == 0 ? geometry.key_dim() : geometry.value_dim();
    const int64_t blocks = client::KeptBlocks(open, static_cast<uint32_t>(kept));
    const int64_t block_tokens = open.paged().block_tokens();
    const auto shape = [&](int64_t dim) -> std::vector<int64_t> {
      if (blocks > 0 && open.layout() == v1::LAYOUT_HEAD_TOKEN_DIM) {
        return {blocks, heads, block_tokens, dim};
      }
      if (blocks > 0) return {blocks, block_tokens, heads, dim};
      if (open.layout() == v1::LAYOUT_HEAD_TOKEN_DIM) return {heads, kept, dim};
      return {kept, heads, dim};
    };
    tensors.push_back({Name(layer, "k"), dtype, shape(geometry.key_dim())});
    if (!file->values_in_keys_) tensors.push_back({Name(layer, "v"), dtype, shape(value_dim)});
  }

  for (auto& [key, value] : MethodMetadata(opened.method())) metadata[key] = value;
  if (geometry.values_in_keys()) metadata["values_in_keys"] = "true";
  if (open.has_attention_scale()) {
    metadata["attention_scale"] = absl::StrFormat("%.17g", open.attention_scale());
  }
  if (opened.has_rotary()) Flatten(opened.rotary(), "rotary", &metadata);
  metadata["structkv_version"] = STRUCTKV_VERSION;
  metadata["fingerprint"] = opened.fingerprint();
  file->metadata_ = std::move(metadata);
  size_t reserve = 1024;  // what Finish() adds
  for (const auto& [key, value] : file->metadata_) {
    reserve += 6 * (key.size() + value.size()) + 8;  // escaped at worst
  }
  absl::StatusOr<std::unique_ptr<SafetensorsWriter>> writer =
      SafetensorsWriter::Create(path, std::move(tensors), reserve);
  if (!writer.ok()) return writer.status();
  file->writer_ = *std::move(writer);
  for (auto* metric : {&file->entropy_, &file->sparsity_, &file->variance_, &file->transition_}) {
    metric->assign(layers, NAN);
  }
  return file;
}

absl::Status CompactedFile::Add(const client::LayerResult& layer) {
  absl::Status status = writer_->Write(Name(layer.layer, "positions"), layer.positions.span());
  if (!plan_) {
    status.Update(writer_->Write(Name(layer.layer, "k"), layer.keys.span()));
    if (!values_in_keys_) {
      status.Update(writer_->Write(Name(layer.layer, "v"), layer.values.span()));
    }
  }
  if (key_scales_) {
    status.Update(writer_->Write(Name(layer.layer, "k_scale"), layer.key_scales.span()));
  }
  if (value_scales_) {
    status.Update(writer_->Write(Name(layer.layer, "v_scale"), layer.value_scales.span()));
  }
  if (return_saliency_ && layer.kept_tokens > 0) {
    status.Update(writer_->Write(Name(layer.layer, "saliency"), layer.saliency.span()));
  }
  if (layer.metrics.has_value() && layer.layer < entropy_.size()) {
    entropy_[layer.layer] = static_cast<float>(layer.metrics->entropy());
    sparsity_[layer.layer] = static_cast<float>(layer.metrics->sparsity());
    variance_[layer.layer] = static_cast<float>(layer.metrics->variance());
  }
  return status;
}

absl::Status CompactedFile::Add(const client::PivotResult& pivot) {
  metadata_["pivot_layer"] = absl::StrCat(pivot.pivot_layer);
  metadata_["pivot_mode"] = PivotModeText(pivot.mode);
  metadata_["decided_at_layer"] = absl::StrCat(pivot.decided_at_layer);
  if (pivot.skeleton_from_layer.has_value()) {
    metadata_["skeleton_from_layer"] = absl::StrCat(*pivot.skeleton_from_layer);
  }
  if (pivot.mode == v1::PIVOT_MODE_PROFILED) {
    metadata_["profiled_prompts"] = absl::StrCat(pivot.profiled_prompts);
  }
  if (pivot.transition_layer.has_value()) {
    metadata_["transition_layer"] = absl::StrCat(*pivot.transition_layer);
  }
  for (const v1::LayerMetrics& layer : pivot.layers) {
    if (layer.has_transition() && layer.layer() < transition_.size()) {
      transition_[layer.layer()] = static_cast<float>(layer.transition());
    }
  }
  absl::Status status =
      writer_->WriteValues("skeleton.positions", absl::MakeConstSpan(pivot.skeleton));
  if (return_centrality_) {
    status.Update(writer_->WriteValues("centrality", absl::MakeConstSpan(pivot.centrality)));
  }
  return status;
}

absl::Status CompactedFile::Finish(const v1::Summary& summary) {
  absl::Status status;
  const auto metric = [&](const char* name, const std::vector<float>& values) {
    status.Update(writer_->WriteValues(name, absl::MakeConstSpan(values)));
  };
  if (has_metrics_) {
    metric("metrics.entropy", entropy_);
    metric("metrics.sparsity", sparsity_);
    metric("metrics.variance", variance_);
  }
  if (has_transition_) metric("metrics.transition", transition_);
  if (!status.ok()) return status;
  metadata_["logical_length"] = absl::StrCat(summary.logical_length());
  metadata_["kv_length"] = absl::StrCat(summary.kv_length());
  metadata_["next_position"] = absl::StrCat(summary.next_position());
  return writer_->Finish(metadata_);
}

}  // namespace structkv::cli
