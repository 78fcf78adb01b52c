#include "client/cpp/credentials.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "structkv/v1/address.h"

namespace structkv::client::internal {
namespace {

// Sends the token with every call.
class TokenPlugin final : public grpc::MetadataCredentialsPlugin {
 public:
  explicit TokenPlugin(const std::string& token) : value_("Bearer " + token) {}

  bool IsBlocking() const override { return false; }
  grpc::Status GetMetadata(grpc::string_ref /*service*/, grpc::string_ref /*method*/,
                           const grpc::AuthContext& /*channel*/,
                           std::multimap<grpc::string, grpc::string>* metadata) override {
    metadata->emplace("authorization", value_);
    return grpc::Status::OK;
  }

 private:
  const std::string value_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> CredentialsFor(
    const std::string& target, const ClientOptions& options) {
  if (options.token.empty()) {
    return options.credentials ? options.credentials : grpc::InsecureChannelCredentials();
  }
  if (!std::all_of(options.token.begin(), options.token.end(), absl::ascii_isgraph)) {
    return absl::InvalidArgumentError(
        "ClientOptions.token has bytes that are no printable ASCII, which metadata cannot hold");
  }
  std::shared_ptr<grpc::ChannelCredentials> channel = options.credentials;
  // gRPC attaches tokens to channels alone that it knows to be private: these are of this host, in
  // plain text.
  if (channel == nullptr && wire::IsUnixAddress(target)) {
    channel = grpc::experimental::LocalCredentials(UDS);
  }
  if (channel == nullptr && wire::IsLoopbackAddress(target)) {
    channel = grpc::experimental::LocalCredentials(LOCAL_TCP);
  }
  if (channel == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("ClientOptions.token would travel to ", target,
                     " in plain text; ClientOptions.credentials are needed"));
  }
  return grpc::CompositeChannelCredentials(
      channel, grpc::MetadataCredentialsFromPlugin(std::make_unique<TokenPlugin>(options.token)));
}

}  // namespace structkv::client::internal
