// A collector of spans behind a real socket: keeps what it is sent, and answers as it is told.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "nlohmann/json.hpp"
#include "tests/testing/certificates.h"

namespace structkv::testkit {

struct CollectorRequest {
  std::string target;
  std::string content_type;
  std::string body;
};

// Thread-safe. Runs one thread.
class FakeCollector {
 public:
  // On a port of the system's choosing; over TLS where there is a certificate.
  explicit FakeCollector(const Authority::Pair& pair = {});
  ~FakeCollector();

  // "http://127.0.0.1:PORT/v1/traces", or "https://..."
  const std::string& endpoint() const;

  // The next requests are answered with these status codes, those after them with 200. 0: never.
  void AnswerWith(std::vector<int> statuses);
  // The body of answers, and the header Retry-After of all but 200.
  void SetReply(std::string body, std::string retry_after = "");
  // Takes no connection any more, as a process that is gone.
  void Close();

  // All that came, also those that were not answered with 200.
  std::vector<CollectorRequest> requests() const;
  // The spans of requests that were answered with 200, in order.
  std::vector<nlohmann::json> spans() const;
  // Waits until there are so many.
  bool WaitForSpans(size_t count) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// The value of a span's attribute, as text; "" where there is none.
std::string AttributeOf(const nlohmann::json& span, const std::string& key);

}  // namespace structkv::testkit
