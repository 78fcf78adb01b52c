// A span: a stretch of time of a trace, with what is known of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/time/time.h"
#include "service/trace/trace_context.h"

namespace structkv::trace {

using Attribute = std::pair<std::string, std::variant<int64_t, std::string>>;

// Numbers are OTLP's.
enum class SpanKind : uint8_t { kInternal = 1, kServer = 2 };

struct Span {
  TraceId trace = {};
  SpanId id = {};
  std::optional<SpanId> parent;  // none: it begins the trace
  std::string trace_state;       // as it came
  std::string name;
  SpanKind kind = SpanKind::kInternal;
  absl::Time begin;
  absl::Time end;
  std::vector<Attribute> attributes;
  // What went wrong; none: nothing.
  std::optional<std::string> error;
};

}  // namespace structkv::trace
