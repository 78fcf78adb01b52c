// HTTP as a monitor speaks it, and as one that does not should not.
#pragma once

#include <map>
#include <string>

namespace structkv::testkit {

struct HttpAnswer {
  int status = 0;  // 0: none came
  std::map<std::string, std::string> headers;
  std::string body;
};

// A request of its own connection. "127.0.0.1:80", "[::1]:80".
HttpAnswer HttpGet(const std::string& address, const std::string& path,
                   const std::string& method = "GET");

// Sends `bytes` as they are and returns all that comes until the server closes; empty where it does
// so without an answer.
std::string HttpRaw(const std::string& address, const std::string& bytes);

}  // namespace structkv::testkit
