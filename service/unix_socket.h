// What is known of a unix socket before a server listens on it.
#pragma once

#include <sys/socket.h>

#include <string>

namespace structkv {

// Whether somebody answers at `address` ("unix:PATH", "unix:///PATH"; false for any other). gRPC
// would take such a socket's place without a word, and what served there would serve nobody. `type`
// as of socket(2).
bool UnixSocketInUse(const std::string& address, int type = SOCK_STREAM);

}  // namespace structkv
