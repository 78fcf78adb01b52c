// Calls as spans: one of the call, below it one of each prompt, and below these one of each layer.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "service/rpc/stream_observer.h"
#include "service/trace/span.h"

namespace structkv::admin {

// Empty where the call is not recorded.
std::vector<trace::Span> SpansOf(const rpc::PromptReport& prompt, const absl::Status& status);
std::vector<trace::Span> SpansOf(const rpc::CompressReport& call, const absl::Status& status);
std::vector<trace::Span> SpansOf(const rpc::FetchReport& fetch, const absl::Status& status);

}  // namespace structkv::admin
