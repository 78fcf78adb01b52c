#include "service/rpc/tenant.h"

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace structkv::rpc {

absl::StatusOr<std::string> TenantOf(const grpc::ServerContextBase& context) {
  const std::shared_ptr<const grpc::AuthContext> peer = context.auth_context();
  if (peer != nullptr && peer->IsPeerAuthenticated()) {
    const std::vector<grpc::string_ref> identity = peer->GetPeerIdentity();
    if (!identity.empty()) {
      return absl::StrCat("peer:", absl::string_view(identity[0].data(), identity[0].size()));
    }
  }
  const auto found = context.client_metadata().find(kTenantKey);
  if (found == context.client_metadata().end()) return std::string("name:");
  const absl::string_view name(found->second.data(), found->second.size());
  if (name.size() > kMaxTenantBytes) {
    return absl::InvalidArgumentError(absl::StrCat("metadata ", kTenantKey, " is ", name.size(),
                                                   " bytes long; at most ", kMaxTenantBytes,
                                                   " are allowed"));
  }
  return absl::StrCat("name:", name);
}

}  // namespace structkv::rpc
