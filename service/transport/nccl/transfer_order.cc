#include "service/transport/nccl/transfer_order.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace structkv::nccl {
namespace {

const char* Name(Direction direction) { return direction == Direction::kSend ? "send" : "receive"; }

// OK where the client's offer is the other end of the service's own transfer.
absl::Status Compare(const std::string& key, const Transfer& own, const Offer& offer) {
  if (own.direction == offer.direction) {
    return absl::InvalidArgumentError(
        absl::StrCat(TransferText(key), ": both ends ", Name(own.direction)));
  }
  if (own.buffers.size() != offer.lengths.size()) {
    return absl::InvalidArgumentError(absl::StrCat(TransferText(key), ": ", offer.lengths.size(),
                                                   " buffers were offered, ", own.buffers.size(),
                                                   " are needed"));
  }
  for (size_t i = 0; i < own.buffers.size(); ++i) {
    if (own.buffers[i].bytes != offer.lengths[i]) {
      return absl::InvalidArgumentError(absl::StrCat(TransferText(key), ": buffer ", i, " has ",
                                                     offer.lengths[i], " bytes, ",
                                                     own.buffers[i].bytes, " are needed"));
    }
  }
  return absl::OkStatus();
}

absl::Status WaitsAlready(const std::string& key) {
  return absl::AlreadyExistsError(absl::StrCat(TransferText(key), " waits already"));
}

}  // namespace

std::string TransferText(const std::string& key) {
  return absl::StrCat("transfer '", absl::CHexEscape(key), "'");
}

absl::Status CheckOffer(const Offer& offer) {
  if (offer.key.empty() || offer.key.size() > kMaxKeyBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("key has ", offer.key.size(), " bytes, 1 to ", kMaxKeyBytes, " are allowed"));
  }
  if (offer.lengths.size() > kMaxBuffersPerTransfer) {
    return absl::InvalidArgumentError(absl::StrCat(TransferText(offer.key), " has ",
                                                   offer.lengths.size(), " buffers, at most ",
                                                   kMaxBuffersPerTransfer, " are allowed"));
  }
  for (int64_t length : offer.lengths) {
    if (length >= 0 && length <= kMaxBufferBytes) continue;
    return absl::InvalidArgumentError(absl::StrCat(TransferText(offer.key), " has a buffer of ",
                                                   length, " bytes, 0 to ", kMaxBufferBytes,
                                                   " are allowed"));
  }
  return absl::OkStatus();
}

absl::Status TransferOrder::Add(const std::string& key, Transfer& transfer) {
  if (own_.contains(key)) return WaitsAlready(key);
  own_.emplace(key, Own{std::move(transfer), Clock::now()});
  Match(key);
  return absl::OkStatus();
}

absl::Status TransferOrder::Add(Offer offer) {
  if (absl::Status status = CheckOffer(offer); !status.ok()) return status;
  if (offers_.contains(offer.key)) return WaitsAlready(offer.key);
  if (offers_.size() >= kMaxWaitingOffers) {
    return absl::ResourceExhaustedError(
        absl::StrCat(offers_.size(), " offers wait, at most ", kMaxWaitingOffers, " are allowed"));
  }
  const std::string key = offer.key;
  offers_.emplace(key, std::move(offer));
  Match(key);
  return absl::OkStatus();
}

void TransferOrder::Match(const std::string& key) {
  const auto own = own_.find(key);
  const auto offer = offers_.find(key);
  if (own == own_.end() || offer == offers_.end()) return;
  absl::Status status = Compare(key, own->second.transfer, offer->second);
  if (status.ok()) {
    own->second.since = Clock::now();
    next_.push_back(key);
    return;
  }
  mismatches_.push_back({key, std::move(own->second.transfer), std::move(status)});
  own_.erase(own);
  offers_.erase(offer);
}

std::vector<TransferOrder::Numbered> TransferOrder::Take() {
  std::vector<Numbered> taken;
  for (std::string& key : std::exchange(next_, {})) {
    offers_.erase(key);
    Transfer transfer = std::move(own_.extract(key).mapped().transfer);
    taken.push_back({++last_sequence_, std::move(key), std::move(transfer)});
  }
  return taken;
}

void TransferOrder::LeaveLine(const std::string& key) {
  next_.erase(std::remove(next_.begin(), next_.end(), key), next_.end());
}

bool TransferOrder::DropOffer(const std::string& key) {
  if (offers_.erase(key) == 0) return false;
  LeaveLine(key);
  return true;
}

std::vector<TransferOrder::Withdrawn> TransferOrder::Withdraw(
    absl::FunctionRef<bool(const Waiting&)> which) {
  std::vector<Withdrawn> taken;
  for (auto own = own_.begin(); own != own_.end();) {
    const auto each = own++;
    const bool offered = offers_.contains(each->first);
    if (!which({each->second.transfer, each->second.since, offered})) continue;
    LeaveLine(each->first);
    taken.push_back({each->first, std::move(each->second.transfer), offered});
    own_.erase(each);
  }
  return taken;
}

}  // namespace structkv::nccl
