// Spans as OTLP/HTTP sends them, in its JSON encoding
// (https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "service/trace/span.h"

namespace structkv::trace {

// An ExportTraceServiceRequest. `resource`: who sends it, as `service.name`. Bytes that are no
// UTF-8 are replaced.
std::string EncodeOtlp(const std::vector<Attribute>& resource, const std::vector<Span>& spans);

// Of an ExportTraceServiceResponse: the spans that were not taken, 0 where it says nothing.
int64_t RejectedSpans(const std::string& response);

}  // namespace structkv::trace
