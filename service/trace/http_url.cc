#include "service/trace/http_url.h"

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace structkv::trace {
namespace {

bool IsHost(absl::string_view host) {
  if (host.empty()) return false;
  for (const char c : host) {
    const auto letter = static_cast<unsigned char>(c);
    if (!absl::ascii_isalnum(letter) && c != '.' && c != '-' && c != '_' && c != ':') return false;
  }
  return true;
}

}  // namespace

std::string HttpUrl::authority() const {
  const bool v6 = absl::StrContains(host, ':');
  return absl::StrCat(v6 ? "[" : "", host, v6 ? "]" : "", ":", port);
}

absl::StatusOr<HttpUrl> ParseHttpUrl(absl::string_view text) {
  const absl::Status bad = absl::InvalidArgumentError(
      absl::StrCat("'", text, "' is no http:// or https:// URL; write for instance ",
                   "http://127.0.0.1:4318/v1/traces"));
  absl::string_view rest = text;
  HttpUrl url;
  url.tls = absl::ConsumePrefix(&rest, "https://");
  if (url.tls) {
    url.port = "443";
  } else if (!absl::ConsumePrefix(&rest, "http://")) {
    return bad;
  }
  const size_t slash = rest.find('/');
  absl::string_view authority = rest.substr(0, slash);
  if (slash != absl::string_view::npos) url.path = std::string(rest.substr(slash));
  for (const char c : url.path) {
    if (!absl::ascii_isgraph(static_cast<unsigned char>(c)) || c == '#') return bad;
  }
  absl::string_view host = authority;
  absl::string_view port;
  bool has_port = false;
  if (absl::ConsumePrefix(&host, "[")) {
    const size_t end = host.find(']');
    if (end == absl::string_view::npos) return bad;
    port = host.substr(end + 1);
    host = host.substr(0, end);
    has_port = absl::ConsumePrefix(&port, ":");
    if (!has_port && !port.empty()) return bad;
  } else if (const size_t colon = host.find(':'); colon != absl::string_view::npos) {
    port = host.substr(colon + 1);
    host = host.substr(0, colon);
    has_port = true;
  }
  int number = 0;
  if (has_port && (!absl::SimpleAtoi(port, &number) || number < 1 || number > 65535)) return bad;
  if (!IsHost(host)) return bad;
  url.host = std::string(host);
  if (has_port) url.port = std::to_string(number);
  return url;
}

}  // namespace structkv::trace
