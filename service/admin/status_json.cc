#include "service/admin/status_json.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace structkv::admin {
namespace {

using Json = nlohmann::ordered_json;

std::string TimeText(absl::Time time) {
  return absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", time, absl::UTCTimeZone());
}

Json StatusOf(const absl::Status& status) {
  return {{"code", absl::StatusCodeToString(status.code())},
          {"text", std::string(status.message())}};
}

// Two hexadecimal digits for each stretch.
std::string Hex(const std::array<uint8_t, rpc::PromptPicture::kStretches>& shares) {
  std::string text;
  for (const uint8_t share : shares) absl::StrAppendFormat(&text, "%02x", share);
  return text;
}

Json PictureOf(const rpc::PromptPicture& picture) {
  const rpc::PromptPicture::View view = picture.view();
  Json layers = Json::array();
  for (const auto& [number, layer] : view.layers) {
    Json one = {{"layer", number}, {"kept_tokens", layer.kept_tokens}, {"kept", Hex(layer.kept)}};
    if (layer.metrics.has_value()) {
      one["entropy"] = layer.metrics->entropy;
      one["sparsity"] = layer.metrics->sparsity;
      one["variance"] = layer.metrics->variance;
    }
    if (layer.transition.has_value()) one["transition"] = *layer.transition;
    layers.push_back(std::move(one));
  }
  Json json = {{"kept_share", view.kept_share}, {"layers", std::move(layers)}};
  if (view.pivot.has_value()) {
    json["pivot"] = {{"layer", view.pivot->layer},
                     {"decided_at_layer", view.pivot->decided_at_layer},
                     {"skeleton_tokens", view.pivot->skeleton_tokens}};
  }
  return json;
}

Json PromptOf(const rpc::PromptReport& prompt) {
  Json json = {{"id", prompt.id},
               {"client_session", prompt.call.session_id},
               {"trace", prompt.call.trace_id},
               {"method", prompt.method},
               {"transport", prompt.transport},
               {"prompt_tokens", prompt.prompt_tokens},
               {"layers", prompt.layers},
               {"answered", prompt.answered},
               {"input_bytes", prompt.input_bytes},
               {"output_bytes", prompt.output_bytes},
               {"reserved_bytes", prompt.reserved_bytes},
               {"micros", prompt.micros}};
  return json;
}

Json PoolsOf(const Readings& readings) {
  Json pools = Json::array();
  for (const auto& [name, pool] : readings.pools) {
    pools.push_back({{"name", name},
                     {"reserved_bytes", pool.reserved_bytes},
                     {"limit_bytes", pool.limit_bytes}});
  }
  return pools;
}

}  // namespace

std::string StatusJson(const Status& status) {
  const Readings& readings = status.readings;
  Json json = {{"version", readings.version},
               {"revision", readings.revision},
               {"backend", readings.backend},
               {"device", status.device},
               {"threads", status.threads},
               {"addresses", status.addresses},
               {"uptime_seconds", absl::ToInt64Seconds(status.uptime)},
               {"draining", readings.draining},
               {"active_prompts", readings.active_prompts},
               {"active_streams", readings.active_streams},
               {"connections", readings.connections},
               {"connections_refused", readings.connections_refused},
               {"connections_broken", readings.connections_broken},
               {"streams_refused",
                readings.streams_refused.connection + readings.streams_refused.unix_sockets},
               {"queued_layers", readings.queued_layers},
               {"held_caches", readings.held_caches},
               {"regions", readings.regions},
               {"nccl_pairs", readings.nccl_pairs},
               {"log_lines_dropped", readings.log_lines_dropped},
               {"pools", PoolsOf(readings)}};
  if (status.drain.has_value()) {
    json["drain"] = {{"streams", status.drain->streams},
                     {"prompts", status.drain->prompts},
                     {"nccl_pairs", status.drain->nccl_pairs},
                     {"held_caches", status.drain->held_caches},
                     {"left_seconds", absl::ToDoubleSeconds(status.drain->left)}};
  }
  std::vector<rpc::PromptReport> running = status.running;
  std::sort(running.begin(), running.end(),
            [](const auto& a, const auto& b) { return a.micros > b.micros; });
  json["running"] = Json::array();
  for (const rpc::PromptReport& prompt : running) json["running"].push_back(PromptOf(prompt));
  json["prompts"] = Json::array();
  for (const Recent::Prompt& prompt : status.prompts) {
    Json one = PromptOf(prompt.report);
    if (prompt.report.picture != nullptr) one["picture"] = PictureOf(*prompt.report.picture);
    one["ended"] = TimeText(prompt.ended);
    one["status"] = StatusOf(prompt.status);
    json["prompts"].push_back(std::move(one));
  }
  json["errors"] = Json::array();
  for (const Recent::Error& error : status.errors) {
    json["errors"].push_back(
        {{"time", TimeText(error.time)}, {"what", error.what}, {"status", StatusOf(error.status)}});
  }
  // Bytes that are no UTF-8 are replaced.
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace structkv::admin
