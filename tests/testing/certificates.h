// Certificates and keys, made for a test.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "grpcpp/channel.h"

namespace structkv::testkit {

// An authority, which signs what the tests need.
class Authority {
 public:
  struct Pair {
    std::string certificate;  // PEM
    std::string key;          // PEM
  };

  Authority();
  ~Authority();

  // Its own certificate, PEM.
  const std::string& certificate() const { return certificate_; }
  // One whose alternative names are `names` ("DNS:localhost", "IP:127.0.0.1", "URI:spiffe://a/b"),
  // good for so many seconds from now, and a minute back.
  Pair Sign(const std::vector<std::string>& names, int seconds = 3600) const;

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
  std::string certificate_;
};

// A channel of its own connection that trusts `authority`, and shows `own` where it is not empty.
std::shared_ptr<grpc::Channel> NewTlsChannel(const std::string& target,
                                             const std::string& authority,
                                             const Authority::Pair& own = {});

}  // namespace structkv::testkit
