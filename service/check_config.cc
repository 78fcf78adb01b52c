#include "service/check_config.h"

#include <sys/stat.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "service/rpc/identity.h"
#include "service/rpc/tls.h"
#include "service/trace/http_post.h"

namespace structkv {
namespace {

absl::Status CheckTlsFiles(const rpc::TlsOptions& tls, std::string* report) {
  if (!tls.enabled()) {
    absl::StrAppend(report, "  TLS: none\n");
    return absl::OkStatus();
  }
  if (auto made = rpc::MakeCredentials(tls); !made.ok()) return made.status();
  const absl::StatusOr<absl::Time> end = rpc::CertificateExpiry(tls);
  if (!end.ok()) return end.status();
  absl::StrAppend(report, "  tls-certificate ", tls.certificate, ": ends at ",
                  absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", *end, absl::UTCTimeZone()), "\n  tls-key ",
                  tls.key, ": is the certificate's\n");
  if (!tls.client_authorities.empty()) {
    absl::StrAppend(report, "  client-authorities ", tls.client_authorities, ": certificates\n");
  }
  return absl::OkStatus();
}

// Of a file that is to be written: whether its folder is one.
absl::Status CheckFolder(const char* option, const std::string& path, std::string* report) {
  if (path.empty()) return absl::OkStatus();
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  struct stat found = {};
  if (stat(folder.c_str(), &found) != 0 || !S_ISDIR(found.st_mode)) {
    return absl::NotFoundError(absl::StrCat(option, " ", path, ": there is no folder ", folder));
  }
  if (access(folder.c_str(), W_OK | X_OK) != 0) {
    return absl::PermissionDeniedError(
        absl::StrCat(option, " ", path, ": nothing can be written in ", folder));
  }
  absl::StrAppend(report, "  ", option, " ", path, ": its folder can be written\n");
  return absl::OkStatus();
}

absl::Status CheckCollector(const Config& config, std::string* report) {
  if (config.otlp_endpoint.empty()) return absl::OkStatus();
  absl::StatusOr<trace::HttpUrl> url = trace::ParseHttpUrl(config.otlp_endpoint);
  if (!url.ok()) return url.status();
  auto made = trace::HttpPoster::Make(*std::move(url), config.otlp_authorities);
  if (!made.ok()) return made.status();
  absl::StrAppend(report, "  otlp-endpoint ", config.otlp_endpoint, ": well formed\n");
  if (!config.otlp_authorities.empty()) {
    absl::StrAppend(report, "  otlp-authorities ", config.otlp_authorities, ": certificates\n");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> CheckConfig(const Config& config) {
  const ServerOptions& server = config.server;
  if (absl::Status status = CheckOptions(server); !status.ok()) return status;
  std::string report = "structkv-server: the configuration is valid\n";
  absl::StrAppend(&report, "  options: each in its range, and they agree\n");
  if (!config.file.empty()) absl::StrAppend(&report, "  file ", config.file, ": read\n");
  absl::StrAppend(&report, "  listen ", absl::StrJoin(server.listen, ","), ": well formed\n");
  if (!config.admin.address.empty()) {
    absl::StrAppend(&report, "  admin-listen ", config.admin.address, ": well formed\n");
  }
  if (absl::Status status = CheckTlsFiles(server.tls, &report); !status.ok()) return status;
  if (const std::string& path = server.identity.token_file; !path.empty()) {
    const absl::StatusOr<size_t> tokens = rpc::Identity::CountTokens(path);
    if (!tokens.ok()) return tokens.status();
    absl::StrAppend(&report, "  token-file ", path, ": ", *tokens, " tokens\n");
  }
  if (absl::Status status = CheckCollector(config, &report); !status.ok()) return status;
  for (const auto& [option, path] : {std::pair("pivot-profile", server.pivot_profile),
                                     std::pair("region-socket", server.regions.socket.path)}) {
    if (absl::Status status = CheckFolder(option, path, &report); !status.ok()) return status;
  }
  absl::StrAppend(&report, "  not tried: to listen, the backend ", server.backend,
                  server.nccl.library.empty() ? "" : ", NCCL",
                  server.pivot_profile.empty() ? "" : ", what the profile holds", "\n");
  return report;
}

}  // namespace structkv
