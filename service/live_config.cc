#include "service/live_config.h"

#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "service/config_names.h"
#include "service/file_version.h"
#include "service/rpc/stream_set.h"
#include "service/rpc/tls.h"

namespace structkv {
namespace {

// The options whose values differ.
std::vector<std::string> Changed(const Config& one, const Config& other) {
  std::vector<std::string> names;
  for (const auto& [name, value] : other.values) {
    const auto before = one.values.find(name);
    if (before == one.values.end() || before->second != value) names.push_back(name);
  }
  return names;
}

}  // namespace

LiveConfig::LiveConfig(Config config, std::function<std::variant<Config, EarlyExit>()> parse,
                       Server* server, rpc::Log* log)
    : config_(std::move(config)),
      parse_(std::move(parse)),
      server_(server),
      log_(log),
      version_(config_.file_version) {}

void LiveConfig::Reload() {
  version_ = FileVersion(config_.file);
  const absl::StatusOr<std::string> changed = Take();
  if (changed.ok()) {
    log_->Write("reloaded", {{"file", config_.file}, {"changed", *changed}});
  } else {
    const std::string error(changed.status().message());
    log_->Write("reload_refused", {{"file", config_.file}, {"error", error}});
  }
}

void LiveConfig::LookAtTls() {
  const rpc::TlsOptions& tls = config_.server.tls;
  const int64_t now = rpc::SteadyNanos();
  if (!tls.enabled() || now < next_tls_look_) return;
  next_tls_look_ = now + tls.look_seconds * int64_t{1'000'000'000};
  const std::string error(rpc::CertificateExpiry(tls).status().message());
  // Of files that are being replaced one look may see the old one and the new one.
  const bool stands = error == seen_tls_error_;
  seen_tls_error_ = error;
  if (!stands || error == told_tls_error_) return;
  told_tls_error_ = error;
  log_->Write("warning", {{"tls", error.empty() ? "the files can be taken again" : error}});
}

void LiveConfig::Look() {
  LookAtTls();
  if (!config_.watch || config_.file.empty()) return;
  // While a file is being replaced there may be none.
  const std::string version = FileVersion(config_.file);
  if (!version.empty() && version != version_) Reload();
}

absl::StatusOr<std::string> LiveConfig::Take() {
  std::variant<Config, EarlyExit> parsed = parse_();
  if (const auto* refused = std::get_if<EarlyExit>(&parsed)) {
    absl::string_view text = absl::StripAsciiWhitespace(refused->text);
    absl::ConsumePrefix(&text, "structkv-server: ");
    return absl::InvalidArgumentError(text);
  }
  auto& next = std::get<Config>(parsed);
  const std::vector<std::string> changed = Changed(config_, next);
  std::vector<std::string> fixed;
  for (const std::string& name : changed) {
    if (!MayChange(name)) fixed.push_back(name);
  }
  if (!fixed.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat(absl::StrJoin(fixed, ", "),
                     " cannot change while the server runs; it needs "
                     "a new start"));
  }
  if (next.server.tls.enabled()) {
    const absl::StatusOr<absl::Time> end = rpc::CertificateExpiry(next.server.tls);
    if (!end.ok()) return end.status();
  }
  // The last step that may fail; it changes nothing then.
  if (absl::Status status = server_->Reload(next.server); !status.ok()) return status;
  log_->SetSessions(next.log_sessions);
  config_ = std::move(next);
  return absl::StrJoin(changed, ",");
}

}  // namespace structkv
