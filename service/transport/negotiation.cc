#include "service/transport/negotiation.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace structkv::transport {
namespace {

absl::StatusOr<std::shared_ptr<Transport>> GrantOne(Kind kind, const TransportRequest& request,
                                                    const PromptSizes& sizes,
                                                    const Offers& offers) {
  if (kind == Kind::kInline) return InlineTransport();
  const auto offer = offers.find(kind);
  if (offer == offers.end()) return absl::FailedPreconditionError("this server does not have it");
  if (!offer->second.ok()) return absl::FailedPreconditionError(offer->second.status().message());
  return (*offer->second)(request, sizes);
}

}  // namespace

absl::StatusOr<Granted> Negotiate(const TransportRequest& request, const PromptSizes& sizes,
                                  const Offers& offers) {
  if (request.wishes.empty()) return Granted{InlineTransport(), ""};
  std::string reasons;
  for (const Kind kind : request.wishes) {
    absl::StatusOr<std::shared_ptr<Transport>> granted = GrantOne(kind, request, sizes, offers);
    if (granted.ok()) return Granted{*std::move(granted), std::move(reasons)};
    if (!absl::IsFailedPrecondition(granted.status())) return granted.status();
    absl::StrAppend(&reasons, reasons.empty() ? "" : "; ", std::string(KindName(kind)), ": ",
                    granted.status().message());
  }
  return absl::FailedPreconditionError(
      absl::StrCat(request.message, "transports: none can be granted: ", reasons));
}

}  // namespace structkv::transport
