// A small HTTP server for people and monitors: GET and HEAD, one thread, bounded in every way.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace structkv::admin {

struct HttpResponse {
  int status = 200;
  std::string content_type = "text/plain; charset=utf-8";
  std::string body;
};

struct HttpOptions {
  // "host:port", a numeric host or "localhost"; port 0: any free one. "[::1]:80" is IPv6;
  // 0.0.0.0 and [::] are all addresses of both families, as for gRPC.
  std::string address;
  // One more closes the one that has waited longest without a request.
  int max_connections = 64;
  // For a request to come, and for its answer to be taken.
  absl::Duration limit = absl::Seconds(10);
};

// INVALID_ARGUMENT for what is no HttpOptions::address.
absl::Status CheckAddress(const std::string& address);

// Runs one thread, on which the handler is called.
class HttpServer {
 public:
  // The answer to a GET of a path, without its query. Must not block for long.
  using Handler = std::function<HttpResponse(std::string_view path)>;

  // As CheckAddress; UNAVAILABLE where the address cannot be listened on.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const HttpOptions& options,
                                                           Handler handler);
  // Closes all connections.
  ~HttpServer();

  // The address, with the port that was chosen.
  const std::string& address() const;

 private:
  class Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace structkv::admin
