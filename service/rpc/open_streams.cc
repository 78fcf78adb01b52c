#include "service/rpc/open_streams.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "grpc/grpc.h"
#include "grpc/support/alloc.h"
#include "nlohmann/json.hpp"

namespace structkv::rpc {
namespace {

using Json = nlohmann::json;

// What one of gRPC's functions of channelz says; an object without members where that is no object.
Json Parse(char* text) {
  const std::unique_ptr<char, void (*)(void*)> owned(text, gpr_free);
  if (text == nullptr) return Json::object();  // it is gone meanwhile
  Json value = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  return value.is_object() ? value : Json::object();
}

// Proto's JSON has 64-bit numbers as text, and leaves out those that are 0.
int64_t Number(const Json& object, const char* name) {
  int64_t number = 0;
  const auto found = object.find(name);
  if (found != object.end() && found->is_string()) {
    if (!absl::SimpleAtoi(found->get_ref<const std::string&>(), &number)) return 0;
  }
  return number;
}

std::vector<Json> List(const Json& object, const char* name) {
  const auto found = object.find(name);
  return found != object.end() && found->is_array() ? found->get<std::vector<Json>>()
                                                    : std::vector<Json>();
}

// Calls `page` with where to begin until there is nothing more.
template <typename Page, typename Each>
void ForAll(const char* list, const char* id, const Page& page, const Each& each) {
  int64_t next = 0;
  while (true) {
    const Json answer = Parse(page(next));
    const std::vector<Json> entries = List(answer, list);
    for (const Json& entry : entries) {
      const Json& ref = entry.contains("ref") ? entry["ref"] : entry;
      const int64_t number = Number(ref, id);
      each(number, ref);
      next = number + 1;
    }
    if (entries.empty() || answer.value("end", false)) return;
  }
}

}  // namespace

std::vector<OpenStreams> ReadOpenStreams() {
  std::vector<OpenStreams> connections;
  const auto add = [&](int64_t socket, const Json& ref) {
    // "chttp2 ipv4:127.0.0.1:7000".
    const std::string name = ref.value("name", "");
    const Json answer = Parse(grpc_channelz_get_socket(socket));
    const Json data = answer.value("socket", Json::object()).value("data", Json::object());
    connections.push_back({name.substr(name.rfind(' ') + 1), Number(data, "streamsStarted") -
                                                                 Number(data, "streamsSucceeded") -
                                                                 Number(data, "streamsFailed")});
  };
  const auto look = [&](int64_t server, const Json& /*ref*/) {
    ForAll(
        "socketRef", "socketId",
        [server](int64_t begin) { return grpc_channelz_get_server_sockets(server, begin, 0); },
        add);
  };
  ForAll("server", "serverId", grpc_channelz_get_servers, look);
  return connections;
}

std::string PeerName(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = {};
  if (address.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof(text));
    return absl::StrCat("ipv4:", text, ":", ntohs(v4.sin_port));
  }
  if (address.ss_family != AF_INET6) return {};
  const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
  if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) {
    inet_ntop(AF_INET, &v6.sin6_addr.s6_addr[12], text, sizeof(text));
    return absl::StrCat("ipv4:", text, ":", ntohs(v6.sin6_port));
  }
  inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof(text));
  // An URI's brackets and percent sign.
  const std::string scope = v6.sin6_scope_id == 0 ? "" : absl::StrCat("%25", v6.sin6_scope_id);
  return absl::StrCat("ipv6:%5B", text, scope, "%5D:", ntohs(v6.sin6_port));
}

}  // namespace structkv::rpc
