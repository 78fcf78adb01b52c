#include "service/transport/nccl/transfer_order.h"

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

absl::Status TransferOrder::CheckRoom(const std::string& key, bool taken, size_t waiting) const {
  if (taken) return absl::AlreadyExistsError(absl::StrCat(TransferText(key), " waits already"));
  if (waiting < kMaxWaitingTransfers) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat(waiting, " transfers wait, at most ", kMaxWaitingTransfers, " are allowed"));
}

absl::Status TransferOrder::Add(const std::string& key, Transfer& transfer) {
  absl::Status status = CheckRoom(key, own_.contains(key), own_.size());
  if (!status.ok()) return status;
  if (auto offer = offers_.extract(key); !offer.empty()) {
    Decide(key, std::move(transfer), offer.mapped());
  } else {
    own_.emplace(key, Own{std::move(transfer), Clock::now()});
  }
  return absl::OkStatus();
}

absl::Status TransferOrder::Add(Offer offer) {
  absl::Status status = CheckOffer(offer);
  status.Update(CheckRoom(offer.key, offers_.contains(offer.key), offers_.size()));
  if (!status.ok()) return status;
  if (auto own = own_.extract(offer.key); !own.empty()) {
    Decide(offer.key, std::move(own.mapped().transfer), offer);
  } else {
    std::string key = offer.key;
    offers_.emplace(std::move(key), std::move(offer));
  }
  return absl::OkStatus();
}

void TransferOrder::Decide(std::string key, Transfer transfer, const Offer& offer) {
  absl::Status status = Compare(key, transfer, offer);
  if (status.ok()) {
    decided_.numbered.push_back({++last_sequence_, std::move(key), std::move(transfer)});
  } else {
    decided_.mismatched.push_back({std::move(key), std::move(transfer), std::move(status)});
  }
}

absl::StatusOr<Transfer> TransferOrder::Withdraw(const std::string& key) {
  auto own = own_.extract(key);
  if (own.empty()) return absl::NotFoundError(absl::StrCat("no ", TransferText(key), " waits"));
  return std::move(own.mapped().transfer);
}

std::vector<std::pair<std::string, Transfer>> TransferOrder::WithdrawAll(
    std::optional<Clock::time_point> limit) {
  std::vector<std::pair<std::string, Transfer>> taken;
  for (auto own = own_.begin(); own != own_.end();) {
    const auto each = own++;
    if (limit.has_value() && each->second.since >= *limit) continue;
    taken.emplace_back(each->first, std::move(each->second.transfer));
    own_.erase(each);
  }
  return taken;
}

}  // namespace structkv::nccl
