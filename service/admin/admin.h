// The admin port: /metrics, /livez, /readyz, and the status page at /statusz.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "service/admin/http_server.h"
#include "service/admin/telemetry.h"
#include "service/server.h"

namespace structkv::admin {

// Serves from Start to its end. Plain HTTP and for anybody who can reach it: nothing can be changed
// here, but ids of sessions and texts of errors are shown.
class Admin {
 public:
  // `server`, `telemetry` and `log` outlive it; none is null. As HttpServer::Start.
  static absl::StatusOr<std::unique_ptr<Admin>> Start(const HttpOptions& options,
                                                      const Server* server, Telemetry* telemetry,
                                                      const rpc::Log* log);

  const std::string& address() const { return http_->address(); }

 private:
  Admin(const Server* server, Telemetry* telemetry, const rpc::Log* log)
      : server_(server), telemetry_(telemetry), log_(log) {}

  HttpResponse Handle(std::string_view path) const;
  HttpResponse Ready() const;
  Readings Read() const;

  const Server* const server_;
  Telemetry* const telemetry_;
  const rpc::Log* const log_;
  const absl::Time started_ = absl::Now();
  std::unique_ptr<HttpServer> http_;  // the first to go
};

}  // namespace structkv::admin
