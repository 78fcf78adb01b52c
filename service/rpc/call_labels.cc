#include "service/rpc/call_labels.h"

#include <algorithm>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"

namespace structkv::rpc {
namespace {

constexpr absl::string_view kMarks = "._:/+@-";
// What W3C asks those to keep who pass a tracestate on; each span has a copy.
constexpr size_t kMaxTraceStateBytes = 512;

// In the order in which they came.
std::vector<absl::string_view> ValuesOf(const grpc::ServerContextBase& context, const char* key) {
  std::vector<absl::string_view> values;
  const auto [begin, end] = context.client_metadata().equal_range(key);
  for (auto it = begin; it != end; ++it) values.emplace_back(it->second.data(), it->second.size());
  return values;
}

absl::StatusOr<std::string> SessionIdOf(const grpc::ServerContextBase& context) {
  const std::vector<absl::string_view> values = ValuesOf(context, kSessionIdKey);
  if (values.empty()) return std::string();
  if (values.size() > 1) {
    return absl::InvalidArgumentError(absl::StrCat("metadata ", kSessionIdKey, " comes ",
                                                   values.size(), " times; once is allowed"));
  }
  const absl::string_view id = values.front();
  if (id.empty() || id.size() > kMaxSessionIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("metadata ", kSessionIdKey, " is ", id.size(),
                                                   " bytes long; 1 to ", kMaxSessionIdBytes,
                                                   " are allowed"));
  }
  const auto bad = std::find_if(id.begin(), id.end(), [](char c) {
    return !absl::ascii_isalnum(static_cast<unsigned char>(c)) &&
           kMarks.find(c) == absl::string_view::npos;
  });
  if (bad == id.end()) return std::string(id);
  return absl::InvalidArgumentError(
      absl::StrCat("metadata ", kSessionIdKey, " has '", absl::CHexEscape({bad, 1}), "' at byte ",
                   bad - id.begin(), "; letters, digits and ", kMarks, " are allowed"));
}

std::optional<trace::Parent> ParentOf(const grpc::ServerContextBase& context) {
  const std::vector<absl::string_view> values = ValuesOf(context, trace::kTraceParentKey);
  return values.size() == 1 ? trace::ParseTraceParent(values.front()) : std::nullopt;
}

}  // namespace

absl::StatusOr<CallLabels> ReadCallLabels(const grpc::ServerContextBase& context,
                                          std::optional<double> trace_ratio) {
  absl::StatusOr<std::string> session_id = SessionIdOf(context);
  if (!session_id.ok()) return session_id.status();
  CallLabels labels = {.session_id = *std::move(session_id)};
  const std::optional<trace::Parent> parent = ParentOf(context);
  if (parent.has_value()) labels.trace_id = trace::Hex(parent->trace);
  if (!trace_ratio.has_value() || (parent.has_value() && !parent->sampled)) return labels;
  CallSpan span = {.trace = parent.has_value() ? parent->trace : trace::NewTraceId(),
                   .id = trace::NewSpanId(),
                   .begin = absl::Now()};
  if (parent.has_value()) {
    span.parent = parent->span;
    span.trace_state = trace::JoinTraceState(ValuesOf(context, trace::kTraceStateKey));
    if (span.trace_state.size() > kMaxTraceStateBytes) span.trace_state.clear();
  } else if (!trace::SamplesRoot(span.trace, *trace_ratio)) {
    return labels;
  }
  labels.trace_id = trace::Hex(span.trace);
  labels.span = std::make_shared<const CallSpan>(std::move(span));
  return labels;
}

}  // namespace structkv::rpc
