// Whose call it is: from the caller's certificate, from a token, or from what it says.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "grpcpp/server_context.h"
#include "service/live.h"
#include "service/rpc/warn_limit.h"

namespace structkv::rpc {

// Request metadata that names the tenant where nobody is authenticated.
inline constexpr char kTenantKey[] = "structkv-tenant";
inline constexpr size_t kMaxTenantBytes = 128;
// Of a tenant with its kind, "peer:NAME": certificates' names may be long.
inline constexpr size_t kMaxFullTenantBytes = 2048;

struct IdentityOptions {
  // Which of the names in a client's certificate (its subject alternative names; where it has none,
  // its common name) is its tenant: the first that fits a pattern, in which '*' is any run of
  // characters. Empty: the first name.
  std::vector<std::string> certificate_names;
  // Certificates with a name that fits one of these patterns are a proxy's, whose calls are
  // others': each has their name as metadata kTenantKey, or their token where there is a token
  // file. Such a name must fit a pattern of certificate_names too, where there are any.
  std::vector<std::string> proxy_names;
  // File of lines "TENANT TOKEN"; blank ones and those that begin with '#' are skipped. Calls
  // without a certificate must then have a token, as metadata `authorization: Bearer TOKEN`. Empty:
  // there are none. Read again where it has changed.
  std::string token_file;
  // A file that was changed and cannot be taken (the tokens of before stay); callers that are
  // refused, once in ten seconds at most. May be empty.
  std::function<void(const std::string&)> warn;
};

inline constexpr size_t kMinTokenBytes = 16;

// Calls that were refused for whose they are.
struct RefusedCalls {
  int64_t unauthenticated = 0;
  int64_t permission_denied = 0;
};

// Thread-safe. Tenants of certificates are "peer:NAME", those of tokens "token:TENANT", others
// "name:TENANT": they never meet.
class Identity {
 public:
  // NOT_FOUND or INVALID_ARGUMENT, with the line, for a token file that cannot be taken.
  static absl::StatusOr<std::shared_ptr<Identity>> Open(IdentityOptions options);

  // How many tokens a file holds. What Open returns for one that cannot be taken.
  static absl::StatusOr<size_t> CountTokens(const std::string& path);

  // Takes other patterns, and reads the token file. What Open returns; then nothing changes.
  absl::Status Reload(std::vector<std::string> certificate_names,
                      std::vector<std::string> proxy_names);

  // UNAUTHENTICATED   there are tokens, and the call has none that is among them; or it comes by a
  //                   proxy that does not say whose it is
  // PERMISSION_DENIED no name of the certificate fits, or what the proxy says does not; or it is
  //                   too long
  // INVALID_ARGUMENT  the metadata's tenant is too long
  // The first two are counted: once a call, please.
  absl::StatusOr<std::string> TenantOf(const grpc::ServerContextBase& context);

  RefusedCalls refused() const { return {unauthenticated_, permission_denied_}; }

  // The tenant of what comes over a socket of this host, which authenticates nobody: what the
  // client says, or what GetCapabilities told it that it is.
  static std::string LocalTenant(absl::string_view claimed);

 private:
  struct Token {
    std::string tenant;
    std::string token;
  };

  struct Names {
    std::vector<std::string> tenants;
    std::vector<std::string> proxies;
  };

  explicit Identity(IdentityOptions options)
      : options_(std::move(options)), names_({options_.certificate_names, options_.proxy_names}) {}
  static absl::StatusOr<std::vector<Token>> Read(const std::string& path);
  absl::Status Load();
  // Looks whether the file has changed, once a second at most.
  void Refresh();
  absl::StatusOr<std::string> Find(const grpc::ServerContextBase& context);
  void CountRefused(const std::string& peer, const absl::Status& status);
  bool IsProxy(const std::vector<grpc::string_ref>& names) const;
  absl::StatusOr<std::string> OfCertificate(const std::vector<grpc::string_ref>& names) const;
  absl::StatusOr<std::string> OfToken(const grpc::ServerContextBase& context);

  const IdentityOptions options_;
  Live<Names> names_;
  std::mutex mutex_;
  std::vector<Token> tokens_;
  std::optional<std::chrono::steady_clock::time_point> looked_;
  std::string version_;  // of the file that was read
  std::atomic<int64_t> unauthenticated_{0};
  std::atomic<int64_t> permission_denied_{0};
  WarnLimit warn_limit_;
};

// Whether `text` fits `pattern`, in which '*' is any run of characters.
bool FitsPattern(absl::string_view pattern, absl::string_view text);

}  // namespace structkv::rpc
