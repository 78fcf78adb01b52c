#include "service/rpc/identity.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "service/file_version.h"

namespace structkv::rpc {
namespace {

constexpr std::chrono::seconds kLookInterval(1);

absl::string_view View(grpc::string_ref text) { return {text.data(), text.size()}; }

// In a time that does not depend on where they differ.
bool SameToken(absl::string_view one, absl::string_view other) {
  if (one.size() != other.size()) return false;
  unsigned difference = 0;
  for (size_t i = 0; i < one.size(); ++i) {
    difference |= static_cast<unsigned char>(one[i]) ^ static_cast<unsigned char>(other[i]);
  }
  return difference == 0;
}

bool FitsAny(const std::vector<std::string>& patterns, absl::string_view name) {
  return std::any_of(patterns.begin(), patterns.end(),
                     [name](const std::string& pattern) { return FitsPattern(pattern, name); });
}

}  // namespace

bool FitsPattern(absl::string_view pattern, absl::string_view text) {
  // Where the last '*' was, and the text that it has taken so far.
  size_t star = absl::string_view::npos;
  size_t taken = 0;
  size_t p = 0;
  size_t t = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      taken = t;
    } else if (p < pattern.size() && pattern[p] == text[t]) {
      ++p;
      ++t;
    } else if (star != absl::string_view::npos) {
      p = star + 1;
      t = ++taken;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == absl::string_view::npos;
}

absl::StatusOr<std::shared_ptr<Identity>> Identity::Open(IdentityOptions options) {
  std::shared_ptr<Identity> identity(new Identity(std::move(options)));
  if (!identity->options_.token_file.empty()) {
    const std::lock_guard lock(identity->mutex_);
    if (absl::Status status = identity->Load(); !status.ok()) return status;
  }
  return identity;
}

absl::Status Identity::Reload(std::vector<std::string> certificate_names,
                              std::vector<std::string> proxy_names) {
  const std::lock_guard lock(mutex_);
  if (!options_.token_file.empty()) {
    if (absl::Status status = Load(); !status.ok()) return status;
  }
  names_.Set({std::move(certificate_names), std::move(proxy_names)});
  return absl::OkStatus();
}

absl::Status Identity::Load() {
  version_ = FileVersion(options_.token_file);
  absl::StatusOr<std::vector<Token>> tokens = Read(options_.token_file);
  if (tokens.ok()) tokens_ = *std::move(tokens);
  return tokens.status();
}

absl::StatusOr<size_t> Identity::CountTokens(const std::string& path) {
  const absl::StatusOr<std::vector<Token>> tokens = Read(path);
  if (!tokens.ok()) return tokens.status();
  return tokens->size();
}

absl::StatusOr<std::vector<Identity::Token>> Identity::Read(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("token-file ", path, " cannot be read"));
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  std::vector<Token> tokens;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line[0] == '#') continue;
    const std::vector<std::string> parts =
        absl::StrSplit(line, absl::ByAnyChar(" \t"), absl::SkipEmpty());
    const std::string where = absl::StrCat("token-file ", path, ", line ", number, ": ");
    if (parts.size() != 2) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, parts.size(), " words; a tenant and its token are expected"));
    }
    if (parts[0].size() > kMaxTenantBytes) {
      return absl::InvalidArgumentError(absl::StrCat(where, "the tenant has ", parts[0].size(),
                                                     " bytes; at most ", kMaxTenantBytes,
                                                     " are allowed"));
    }
    if (parts[1].size() < kMinTokenBytes) {
      return absl::InvalidArgumentError(absl::StrCat(where, "the token has ", parts[1].size(),
                                                     " bytes; at least ", kMinTokenBytes,
                                                     " are needed"));
    }
    const bool twice = std::any_of(tokens.begin(), tokens.end(),
                                   [&](const Token& one) { return one.token == parts[1]; });
    if (twice) return absl::InvalidArgumentError(absl::StrCat(where, "the token came before"));
    tokens.push_back({parts[0], parts[1]});
  }
  if (tokens.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("token-file ", path, " holds no token"));
  }
  return tokens;
}

void Identity::Refresh() {
  const auto now = std::chrono::steady_clock::now();
  if (looked_.has_value() && now - *looked_ < kLookInterval) return;
  looked_ = now;
  if (FileVersion(options_.token_file) == version_) return;
  const absl::Status loaded = Load();
  if (!loaded.ok() && options_.warn) {
    options_.warn(absl::StrCat(loaded.message(), "; the tokens of before stay"));
  }
}

absl::StatusOr<std::string> Identity::TenantOf(const grpc::ServerContextBase& context) {
  absl::StatusOr<std::string> tenant = Find(context);
  if (!tenant.ok()) CountRefused(context.peer(), tenant.status());
  return tenant;
}

void Identity::CountRefused(const std::string& peer, const absl::Status& status) {
  if (absl::IsUnauthenticated(status)) {
    ++unauthenticated_;
  } else if (absl::IsPermissionDenied(status)) {
    ++permission_denied_;
  } else {
    return;
  }
  if (!options_.warn || !warn_limit_.IsDue()) return;
  const RefusedCalls all = refused();
  options_.warn(absl::StrCat("a call of ", peer, " is refused: ", status.message(), "; ",
                             all.unauthenticated + all.permission_denied,
                             " calls have been since the start"));
}

absl::StatusOr<std::string> Identity::Find(const grpc::ServerContextBase& context) {
  const std::shared_ptr<const grpc::AuthContext> peer = context.auth_context();
  const bool certified = peer != nullptr && peer->IsPeerAuthenticated();
  if (certified && !IsProxy(peer->GetPeerIdentity())) {
    return OfCertificate(peer->GetPeerIdentity());
  }
  if (!options_.token_file.empty()) return OfToken(context);
  // What a proxy says was checked by the proxy.
  const absl::string_view kind = certified ? "peer:" : "name:";
  const auto found = context.client_metadata().find(kTenantKey);
  if (certified && (found == context.client_metadata().end() || found->second.empty())) {
    return absl::UnauthenticatedError(
        absl::StrCat("the proxy does not say whose call it is (metadata ", kTenantKey, ")"));
  }
  if (found == context.client_metadata().end()) return std::string(kind);
  // Which of them the proxy wrote, and which came through it, nobody can tell.
  if (const size_t count = context.client_metadata().count(kTenantKey); certified && count > 1) {
    return absl::UnauthenticatedError(absl::StrCat("the proxy says ", count,
                                                   " times whose call it is (metadata ", kTenantKey,
                                                   "); once is allowed"));
  }
  if (found->second.size() > kMaxTenantBytes) {
    return absl::InvalidArgumentError(absl::StrCat("metadata ", kTenantKey, " is ",
                                                   found->second.size(), " bytes long; at most ",
                                                   kMaxTenantBytes, " are allowed"));
  }
  if (const std::vector<std::string> patterns = names_.Get().tenants;
      certified && !patterns.empty() && !FitsAny(patterns, View(found->second))) {
    return absl::PermissionDeniedError(absl::StrCat("the proxy's caller, ", View(found->second),
                                                    ", is not allowed here (--client-names)"));
  }
  return absl::StrCat(kind, View(found->second));
}

bool Identity::IsProxy(const std::vector<grpc::string_ref>& names) const {
  const std::vector<std::string> patterns = names_.Get().proxies;
  return std::any_of(names.begin(), names.end(),
                     [&](const grpc::string_ref& name) { return FitsAny(patterns, View(name)); });
}

absl::StatusOr<std::string> Identity::OfCertificate(
    const std::vector<grpc::string_ref>& names) const {
  const std::vector<std::string> patterns = names_.Get().tenants;
  for (const grpc::string_ref& name : names) {
    if (!patterns.empty() && !FitsAny(patterns, View(name))) continue;
    std::string tenant = absl::StrCat("peer:", View(name));
    if (tenant.size() <= kMaxFullTenantBytes) return tenant;
    return absl::PermissionDeniedError(absl::StrCat("the name of the client's certificate has ",
                                                    name.size(), " bytes; at most ",
                                                    kMaxFullTenantBytes - 5, " are allowed"));
  }
  std::vector<absl::string_view> views;
  for (const grpc::string_ref& name : names) views.push_back(View(name));
  return absl::PermissionDeniedError(absl::StrCat("no name of the client's certificate (",
                                                  absl::StrJoin(views, ", "),
                                                  ") is allowed here (--client-names)"));
}

absl::StatusOr<std::string> Identity::OfToken(const grpc::ServerContextBase& context) {
  const auto found = context.client_metadata().find("authorization");
  if (found == context.client_metadata().end()) {
    return absl::UnauthenticatedError(
        "the call has no metadata `authorization: Bearer TOKEN`, which this server asks for");
  }
  absl::string_view token = View(found->second);
  const bool bearer = absl::ConsumePrefix(&token, "Bearer ");
  const std::lock_guard lock(mutex_);
  Refresh();
  const Token* fit = nullptr;
  for (const Token& one : tokens_) {
    if (SameToken(one.token, token)) fit = &one;
  }
  if (!bearer || fit == nullptr) {
    return absl::UnauthenticatedError("the token in metadata `authorization` is not known here");
  }
  return absl::StrCat("token:", fit->tenant);
}

std::string Identity::LocalTenant(absl::string_view claimed) {
  for (absl::string_view kind : {"peer:", "token:", "name:"}) {
    if (absl::StartsWith(claimed, kind)) return std::string(claimed);
  }
  return absl::StrCat("name:", claimed);
}

}  // namespace structkv::rpc
