// One HTTP request that takes a limited time.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/trace/http_url.h"

namespace structkv::trace {

struct HttpReply {
  int status = 0;
  std::string body;                           // at most HttpPoster::kMaxReplyBytes are taken
  std::optional<absl::Duration> retry_after;  // where it names seconds
};

// Posts on the calling thread, over TLS where the URL says so: the server must show a certificate
// of its name. One call of Post at a time; Hurry from any thread.
class HttpPoster {
 public:
  static constexpr size_t kMaxReplyBytes = 64 << 10;

  // `authorities`: PEM file of those of one of which a server must show a certificate; empty: the
  // system's. INVALID_ARGUMENT where that cannot be taken, or the URL is not one of https.
  static absl::StatusOr<std::unique_ptr<HttpPoster>> Make(HttpUrl url,
                                                          const std::string& authorities);
  ~HttpPoster();

  // On a connection of its own. UNAVAILABLE where nobody answers, DEADLINE_EXCEEDED where that is
  // not done within `limit`. A look-up of a name may take longer.
  absl::StatusOr<HttpReply> Post(const std::string& content_type, std::string body,
                                 absl::Duration limit);
  // A call that runs, and those to come, end within `limit` from now on. Those to come look no name
  // up that was found before.
  void Hurry(absl::Duration limit);

 private:
  class Impl;
  explicit HttpPoster(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace structkv::trace
