// TLS of the server's addresses, with certificates that may change while it runs.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/security/server_credentials.h"

namespace structkv::rpc {

// PEM files. They are looked at again and again; a new certificate must come together with
// its key (Kubernetes changes both at once). Connections that there are go on.
struct TlsOptions {
  // The server's certificate, and those between it and an authority; empty: no TLS.
  std::string certificate;
  std::string key;
  // Authorities of clients, which then must show a certificate of one of them; empty: none is asked
  // for.
  std::string client_authorities;
  int look_seconds = 10;

  bool enabled() const { return !certificate.empty(); }
};

// For the options; reads nothing. INVALID_ARGUMENT where one is without another that it needs.
absl::Status CheckTls(const TlsOptions& options);

// Of an enabled one. Also NOT_FOUND for a file that cannot be read, and INVALID_ARGUMENT for one
// that is no such file, for a key that is not the certificate's, and for a certificate that has
// expired.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeCredentials(const TlsOptions& options);

// When the first of an enabled one's certificates ends. The errors of MakeCredentials for files
// that cannot be taken now: gRPC goes on with those of before.
absl::StatusOr<absl::Time> CertificateExpiry(const TlsOptions& options);

// Whether gRPC takes an address for a unix socket, which has no TLS.
bool IsUnixAddress(const std::string& address);
// Whether an address to listen on ("host:port", "unix:...") is reached from this host alone.
bool IsLocalAddress(const std::string& address);

}  // namespace structkv::rpc
