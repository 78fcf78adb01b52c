// W3C Trace Context (https://www.w3.org/TR/trace-context/): who called, in the terms of a
// distributed trace.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace structkv::trace {

using TraceId = std::array<uint8_t, 16>;
using SpanId = std::array<uint8_t, 8>;

// The lower-case names of the headers, which are those of gRPC's metadata.
inline constexpr char kTraceParentKey[] = "traceparent";
inline constexpr char kTraceStateKey[] = "tracestate";
// Members of a tracestate, at most.
inline constexpr size_t kMaxStateMembers = 32;

// What a `traceparent` says.
struct Parent {
  TraceId trace = {};
  SpanId span = {};
  bool sampled = false;
};

// nullopt for what the specification's section 3.2 does not allow: another length or letter than
// version 00 has, the version ff, and ids of zeros. Of versions to come the fields of 00 are taken.
std::optional<Parent> ParseTraceParent(absl::string_view text);

// The values of `tracestate`, which may be several, as one; members keep their order, empty ones
// go. Empty for what section 3.3 does not allow: another key or value, the same key twice, or more
// than kMaxStateMembers.
std::string JoinTraceState(const std::vector<absl::string_view>& values);

// Random, not zero. Thread-safe.
TraceId NewTraceId();
SpanId NewSpanId();

// Lower-case hexadecimal digits.
std::string Hex(const TraceId& id);
std::string Hex(const SpanId& id);

// Whether a trace that begins here is sampled: that of a share `ratio` of the ids, the same ones
// everywhere.
bool SamplesRoot(const TraceId& id, double ratio);

}  // namespace structkv::trace
