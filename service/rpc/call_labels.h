// What a caller says of a call by its metadata, beside who it is: a name for logs and the status
// page, and the trace that the call is a part of.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/server_context.h"
#include "service/trace/trace_context.h"

namespace structkv::rpc {

// The caller's own name for a prompt, a batch of prompts or a fetch: letters, digits and "._:/+@-".
inline constexpr char kSessionIdKey[] = "structkv-session-id";
inline constexpr size_t kMaxSessionIdBytes = 128;

// A call that is recorded as a span.
struct CallSpan {
  trace::TraceId trace = {};
  trace::SpanId id = {};
  std::optional<trace::SpanId> parent;  // the caller's; none: the trace begins here
  std::string trace_state;
  absl::Time begin;
};

struct CallLabels {
  std::string session_id;                // kSessionIdKey; empty: none was given
  std::string trace_id;                  // of the caller's trace, or of its own span; may be empty
  std::shared_ptr<const CallSpan> span;  // null: nothing is recorded
};

// `trace_ratio`: the share of calls that are recorded, of those that come without a valid
// traceparent; with one its sampled flag decides. None: nothing is. INVALID_ARGUMENT for a session
// id that is longer, has other letters, or comes twice; a traceparent or tracestate that is not
// valid is as none.
absl::StatusOr<CallLabels> ReadCallLabels(const grpc::ServerContextBase& context,
                                          std::optional<double> trace_ratio);

}  // namespace structkv::rpc
