// What gRPC itself knows of the connections to the servers of this process (its channelz): streams
// also that no service has been told of, since their request has not come.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

namespace structkv::rpc {

struct OpenStreams {
  std::string peer;  // as ServerContext::peer() names it: "ipv4:127.0.0.1:7000"
  int64_t count = 0;
};

// Of each connection. Takes some ten microseconds for each.
std::vector<OpenStreams> ReadOpenStreams();

// As gRPC names the peer of that address; empty where it is neither IPv4 nor IPv6.
std::string PeerName(const sockaddr_storage& address);

}  // namespace structkv::rpc
