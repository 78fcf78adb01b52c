#include "client/cpp/target.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>

#include <algorithm>
#include <memory>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace structkv::client::internal {
namespace {

constexpr char kNameScheme[] = "dns:///";

// "[name]:port" or "name:port" in two; false where there is no port.
bool Split(absl::string_view name, std::string* host, std::string* port) {
  const size_t colon = name.rfind(':');
  if (colon == absl::string_view::npos || colon == 0 || colon + 1 == name.size()) return false;
  absl::string_view first = name.substr(0, colon);
  if (absl::ConsumePrefix(&first, "[")) absl::ConsumeSuffix(&first, "]");
  *host = std::string(first);
  *port = std::string(name.substr(colon + 1));
  return !host->empty();
}

std::string AddressText(const addrinfo& info, absl::string_view port) {
  char text[INET6_ADDRSTRLEN] = {};
  if (info.ai_family == AF_INET) {
    const auto* in = reinterpret_cast<const sockaddr_in*>(info.ai_addr);
    inet_ntop(AF_INET, &in->sin_addr, text, sizeof(text));
    return absl::StrCat(text, ":", port);
  }
  const auto* in6 = reinterpret_cast<const sockaddr_in6*>(info.ai_addr);
  inet_ntop(AF_INET6, &in6->sin6_addr, text, sizeof(text));
  return absl::StrCat("[", text, "]:", port);
}

}  // namespace

bool IsIpAddress(absl::string_view address) {
  std::string host;
  std::string port;
  if (!Split(address, &host, &port)) return false;
  in6_addr parsed;
  return inet_pton(AF_INET, host.c_str(), &parsed) == 1 ||
         inet_pton(AF_INET6, host.c_str(), &parsed) == 1;
}

std::string HostOf(const std::string& name) {
  std::string host;
  std::string port;
  Split(name, &host, &port);
  return host;
}

absl::StatusOr<Target> ParseTarget(absl::string_view target) {
  Target parsed;
  for (const absl::string_view part : absl::StrSplit(target, ',')) {
    absl::string_view address = absl::StripAsciiWhitespace(part);
    if (address.empty()) {
      return absl::InvalidArgumentError(
          target.empty() ? "Connect: the target is empty"
                         : absl::StrCat("Connect: the target ", target, " has an empty address"));
    }
    const bool is_name = absl::ConsumePrefix(&address, kNameScheme);
    std::string host;
    std::string port;
    if (is_name && !Split(address, &host, &port)) {
      return absl::InvalidArgumentError(absl::StrCat("Connect: the target ", kNameScheme, address,
                                                     " has no port; dns:///name:port is expected"));
    }
    std::vector<std::string>& all = is_name ? parsed.names : parsed.fixed;
    if (std::find(all.begin(), all.end(), address) == all.end()) all.emplace_back(address);
  }
  return parsed;
}

absl::StatusOr<std::vector<ReplicaAddress>> LookUp(const std::string& name) {
  std::string host;
  std::string port;
  if (!Split(name, &host, &port)) return absl::InvalidArgumentError(name + " has no port");
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), nullptr, &hints, &found);
  if (error != 0) {
    return absl::UnavailableError(
        absl::StrCat(host, " has no address that could be found: ", gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, &freeaddrinfo);
  std::set<std::string> texts;
  for (const int family : {AF_INET, AF_INET6}) {
    for (const addrinfo* each = found; each != nullptr; each = each->ai_next) {
      if (each->ai_family == family) texts.insert(AddressText(*each, port));
    }
    if (!texts.empty()) break;
  }
  if (texts.empty()) return absl::UnavailableError(absl::StrCat(host, " has no address"));
  std::vector<ReplicaAddress> addresses;
  for (const std::string& text : texts) addresses.push_back({text, host});
  return addresses;
}

}  // namespace structkv::client::internal
