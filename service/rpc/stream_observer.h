// What streams tell of their prompts to whoever counts and shows them (service/admin).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "service/rpc/call_labels.h"
#include "service/rpc/prompt_picture.h"
#include "service/rpc/prompt_timeline.h"
#include "service/session/session.h"

namespace structkv::rpc {

// A prompt of a `Compress` stream, running or over. Of one that was refused at open only what was
// known by then.
struct PromptReport {
  std::string id;                           // of its session; empty: there was none
  std::string_view method = "-";            // method::MethodName
  std::string_view transport = "-";         // transport::KindName
  std::string_view wished_transport = "-";  // the first that it asked for
  int64_t prompt_tokens = 0;
  int64_t layers = 0;    // of the prompt
  int64_t answered = 0;  // of them
  int64_t input_bytes = 0;
  int64_t output_bytes = 0;
  int64_t reserved_bytes = 0;
  int64_t micros = 0;                              // since the stream began
  std::string refused_by;                          // session::LimitOf, where a limit did at open
  std::shared_ptr<const PromptPicture> picture;    // null: there was no session
  CallLabels call;                                 // of its stream
  std::shared_ptr<const PromptTimeline> timeline;  // null: the call is not recorded
};

// A `Compress` stream that is over.
struct CompressReport {
  CallLabels call;
  int64_t prompts = 0;  // that were opened, or refused
  int64_t micros = 0;
};

// A `FetchCache` stream that is over.
struct FetchReport {
  std::string_view transport = "-";
  int64_t layers = 0;
  int64_t kv_heads = 0;
  int64_t output_bytes = 0;
  int64_t micros = 0;
  bool info_only = false;  // asks whether it is here, and what it is
  CallLabels call;
};

// Thread-safe. Called on streams' own threads: must not block, nor call back.
class StreamObserver {
 public:
  virtual ~StreamObserver() = default;
  // A layer was computed, or failed.
  virtual void OnLayer(std::string_view method, const session::LayerTiming& timing) = 0;
  // A prompt is over; once for each. `status` is OK where its summary was sent.
  virtual void OnPromptEnd(const PromptReport& prompt, const absl::Status& status) = 0;
  // A stream is over, after its prompts.
  virtual void OnCompressEnd(const CompressReport& call, const absl::Status& status) = 0;
  virtual void OnFetchEnd(const FetchReport& fetch, const absl::Status& status) = 0;
};

}  // namespace structkv::rpc
