#include "service/trace/otlp_json.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace structkv::trace {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kScope[] = "structkv";
// OTLP's status codes.
constexpr int kError = 2;

// Integers of 64 bits are strings in this encoding.
Json ValueOf(const std::variant<int64_t, std::string>& value) {
  if (const auto* number = std::get_if<int64_t>(&value)) {
    return {{"intValue", std::to_string(*number)}};
  }
  return {{"stringValue", std::get<std::string>(value)}};
}

Json AttributesOf(const std::vector<Attribute>& attributes) {
  Json json = Json::array();
  for (const auto& [key, value] : attributes) {
    json.push_back({{"key", key}, {"value", ValueOf(value)}});
  }
  return json;
}

std::string Nanos(absl::Time time) { return std::to_string(absl::ToUnixNanos(time)); }

Json SpanOf(const Span& span) {
  Json json = {{"traceId", Hex(span.trace)}, {"spanId", Hex(span.id)}};
  if (!span.trace_state.empty()) json["traceState"] = span.trace_state;
  if (span.parent.has_value()) json["parentSpanId"] = Hex(*span.parent);
  json["name"] = span.name;
  json["kind"] = static_cast<int>(span.kind);
  json["startTimeUnixNano"] = Nanos(span.begin);
  json["endTimeUnixNano"] = Nanos(span.end);
  json["attributes"] = AttributesOf(span.attributes);
  if (span.error.has_value()) json["status"] = {{"code", kError}, {"message", *span.error}};
  return json;
}

}  // namespace

std::string EncodeOtlp(const std::vector<Attribute>& resource, const std::vector<Span>& spans) {
  Json encoded = Json::array();
  for (const Span& span : spans) encoded.push_back(SpanOf(span));
  const Json scope = {{"scope", {{"name", kScope}}}, {"spans", std::move(encoded)}};
  const Json all = {{"resource", {{"attributes", AttributesOf(resource)}}},
                    {"scopeSpans", Json::array({scope})}};
  const Json request = {{"resourceSpans", Json::array({all})}};
  return request.dump(-1, ' ', false, Json::error_handler_t::replace);
}

int64_t RejectedSpans(const std::string& response) {
  const Json json = Json::parse(response, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("partialSuccess")) return 0;
  const Json& partial = json["partialSuccess"];
  if (!partial.is_object() || !partial.contains("rejectedSpans")) return 0;
  const Json& rejected = partial["rejectedSpans"];
  int64_t count = 0;
  if (rejected.is_number_integer()) {
    count = rejected.get<int64_t>();
  } else if (!rejected.is_string() ||
             !absl::SimpleAtoi(rejected.get_ref<const std::string&>(), &count)) {
    return 0;
  }
  return std::max<int64_t>(0, count);
}

}  // namespace structkv::trace
