#include "service/rpc/identity.h"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

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

// Another one where the file was changed; empty where there is none.
std::string VersionOf(const std::string& path) {
  struct stat file = {};
  if (stat(path.c_str(), &file) != 0) return "";
  return absl::StrCat(file.st_ino, " ", file.st_size, " ", file.st_mtim.tv_sec, " ",
                      file.st_mtim.tv_nsec);
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

absl::Status Identity::Load() {
  const std::string& path = options_.token_file;
  version_ = VersionOf(path);
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
  tokens_ = std::move(tokens);
  return absl::OkStatus();
}

void Identity::Refresh() {
  const auto now = std::chrono::steady_clock::now();
  if (looked_.has_value() && now - *looked_ < kLookInterval) return;
  looked_ = now;
  if (VersionOf(options_.token_file) == version_) return;
  const absl::Status loaded = Load();
  if (!loaded.ok() && options_.warn) {
    options_.warn(absl::StrCat(loaded.message(), "; the tokens of before stay"));
  }
}

absl::StatusOr<std::string> Identity::TenantOf(const grpc::ServerContextBase& context) {
  const std::shared_ptr<const grpc::AuthContext> peer = context.auth_context();
  if (peer != nullptr && peer->IsPeerAuthenticated()) return OfCertificate(peer->GetPeerIdentity());
  if (!options_.token_file.empty()) return OfToken(context);
  const auto found = context.client_metadata().find(kTenantKey);
  if (found == context.client_metadata().end()) return std::string("name:");
  if (found->second.size() > kMaxTenantBytes) {
    return absl::InvalidArgumentError(absl::StrCat("metadata ", kTenantKey, " is ",
                                                   found->second.size(), " bytes long; at most ",
                                                   kMaxTenantBytes, " are allowed"));
  }
  return absl::StrCat("name:", View(found->second));
}

absl::StatusOr<std::string> Identity::OfCertificate(
    const std::vector<grpc::string_ref>& names) const {
  for (const grpc::string_ref& name : names) {
    const auto fits = [&name](const std::string& pattern) {
      return FitsPattern(pattern, View(name));
    };
    const std::vector<std::string>& patterns = options_.certificate_names;
    if (!patterns.empty() && std::none_of(patterns.begin(), patterns.end(), fits)) continue;
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
