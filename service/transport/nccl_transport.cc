#include "service/transport/nccl_transport.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "absl/numeric/int128.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "service/transport/handle.h"
#include "service/transport/slots.h"

namespace structkv::transport {
namespace {

// What tensors begin at multiples of.
constexpr int64_t kPartBytes = 256;

int64_t RoundUp(int64_t bytes) { return (bytes + kPartBytes - 1) / kPartBytes * kPartBytes; }

// How a prompt's memory of the GPU is parted.
struct MemoryLayout {
  explicit MemoryLayout(const PromptSizes& sizes)
      : input_slots(sizes.layers_in_flight),
        input_bytes(RoundUp(sizes.input_key_bytes) + RoundUp(sizes.input_value_bytes)) {
    if (sizes.held || sizes.key_bytes == 0) return;
    // Of each layer that is there, and of those that are on their way back.
    result_slots = std::min(sizes.layers_in_flight + Transfers::kMostSending, sizes.layers);
    result_bytes = RoundUp(sizes.key_bytes) + RoundUp(sizes.value_bytes);
  }

  absl::int128 total() const {
    return absl::int128(input_slots) * input_bytes + absl::int128(result_slots) * result_bytes;
  }

  int64_t input_slots = 0;
  int64_t input_bytes = 0;
  int64_t result_slots = 0;
  int64_t result_bytes = 0;
};

engine::Buffer Part(const std::shared_ptr<std::byte>& slot, int64_t offset, int64_t bytes) {
  if (bytes == 0 || slot == nullptr) return {};
  return engine::Buffer::Lent(slot.get() + offset, static_cast<size_t>(bytes), slot);
}

class NcclTransport final : public Transport, private Transfers {
 public:
  NcclTransport(nccl::Hub* hub, nccl::Hub::PairId pair, std::shared_ptr<const nccl::PairLife> life,
                const Backend& backend, const PromptSizes& sizes)
      : hub_(*hub),
        pair_(pair),
        life_(std::move(life)),
        backend_(backend),
        sizes_(sizes),
        layout_(sizes) {}

  // What was not ordered yet is not waited for any longer.
  ~NcclTransport() override { hub_.Cancel(pair_, this); }

  Kind kind() const override { return Kind::kNccl; }
  bool in_place() const override { return true; }
  bool host_readable() const override { return false; }
  const Transfers* transfers() const override { return this; }

  absl::StatusOr<engine::Buffer> Resolve(const RegionRange& /*range*/) const override {
    return absl::InvalidArgumentError(
        "the piece has a `range`; the prompt's transport is nccl, which takes `data`, and a "
        "`transfer` of keys and values");
  }
  absl::StatusOr<engine::Buffer> ResolveInPlace(const RegionRange& range) const override {
    return Resolve(range);
  }

  absl::Status Reserve() override {
    const auto bytes = static_cast<int64_t>(layout_.total());
    if (inputs_ != nullptr || bytes == 0) return absl::OkStatus();
    absl::StatusOr<std::shared_ptr<std::byte>> memory = backend_.Reserve(hub_.device(), bytes);
    if (!memory.ok()) return memory.status();
    const int64_t results_at = layout_.input_slots * layout_.input_bytes;
    inputs_ = std::make_shared<Slots>(*memory, 0, layout_.input_slots, layout_.input_bytes);
    results_ =
        std::make_shared<Slots>(*memory, results_at, layout_.result_slots, layout_.result_bytes);
    if (!gives_room()) return absl::OkStatus();
    place_.data = memory->get() + results_at;
    place_.range.size_bytes = static_cast<uint64_t>(bytes - results_at);
    place_.transfer_prefix = absl::StrCat("result/", absl::BytesToHexString(NewHandle()), "/");
    return absl::OkStatus();
  }

  bool gives_room() const override { return layout_.result_slots > 0; }
  void GiveRoom(engine::LayerInput* input) const override {
    if (inputs_ == nullptr) return;
    if (layout_.input_bytes > 0) {
      const std::shared_ptr<std::byte> slot = inputs_->Take();
      input->keys = Part(slot, 0, sizes_.input_key_bytes);
      input->values = Part(slot, RoundUp(sizes_.input_key_bytes), sizes_.input_value_bytes);
    }
    if (!gives_room()) return;
    const std::shared_ptr<std::byte> slot = results_->Take();
    input->key_room = Part(slot, 0, sizes_.key_bytes);
    input->value_room = Part(slot, RoundUp(sizes_.key_bytes), sizes_.value_bytes);
  }
  ResultPlace result_place() const override { return place_; }
  absl::Status Check() const override { return life_->status(); }

 private:
  void Receive(const std::string& key, const engine::LayerInput& input, Done done) const override {
    Start(nccl::Direction::kReceive, key, {&input.keys, &input.values}, std::move(done));
  }
  void Send(const engine::LayerOutput& output, Done done) const override {
    Start(nccl::Direction::kSend, place_.TransferKey(output.layer), {&output.keys, &output.values},
          std::move(done));
  }

  void Start(nccl::Direction direction, const std::string& key,
             std::initializer_list<const engine::Buffer*> tensors, Done done) const {
    nccl::Transfer transfer;
    transfer.direction = direction;
    auto owners = std::make_shared<std::vector<std::shared_ptr<const void>>>();
    for (const engine::Buffer* tensor : tensors) {
      if (tensor->empty()) continue;
      transfer.buffers.push_back({tensor->data(), static_cast<int64_t>(tensor->size())});
      owners->push_back(tensor->owner());
    }
    transfer.hold = std::move(owners);
    transfer.owner = this;
    transfer.done = [life = life_, done = std::move(done)](const absl::Status& status) mutable {
      // Of a pair that has ended before, the hub knows no more than that.
      const absl::Status ended = status.ok() ? absl::OkStatus() : life->status();
      done(ended.ok() ? status : ended);
    };
    hub_.Submit(pair_, key, std::move(transfer));
  }

  nccl::Hub& hub_;
  const nccl::Hub::PairId pair_;
  const std::shared_ptr<const nccl::PairLife> life_;
  const Backend& backend_;
  const PromptSizes sizes_;
  const MemoryLayout layout_;
  // Since Reserve().
  std::shared_ptr<Slots> inputs_;
  std::shared_ptr<Slots> results_;
  ResultPlace place_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<Transport>> GrantNccl(absl::Span<nccl::Hub* const> hubs,
                                                     const Backend& backend,
                                                     const TransportRequest& request,
                                                     const PromptSizes& sizes) {
  if (sizes.pulled) {
    return absl::FailedPreconditionError(
        "open.pull: keys and values lie in the GPU's memory, so that there is nothing to pull");
  }
  const std::string field = absl::StrCat(request.message, "nccl_pair");
  if (request.nccl_pair == 0) return absl::FailedPreconditionError(field + " names none");
  absl::Status unknown = absl::NotFoundError("there is none");
  for (nccl::Hub* hub : hubs) {
    absl::StatusOr<std::shared_ptr<const nccl::PairLife>> life =
        hub->Find(request.nccl_pair, request.tenant);
    if (!life.ok()) {
      unknown = life.status();
      continue;
    }
    const absl::int128 needed = MemoryLayout(sizes).total();
    const int64_t most = backend.reservable_bytes(hub->device());
    if (needed > most) {
      return absl::FailedPreconditionError(absl::StrCat(
          "it takes ", static_cast<int64_t>(std::min<absl::int128>(needed, INT64_MAX)),
          " bytes of GPU ", hub->device(), "'s memory; ", most, " are set apart for transfers"));
    }
    return std::make_shared<NcclTransport>(hub, request.nccl_pair, *std::move(life), backend,
                                           sizes);
  }
  return absl::Status(unknown.code(), absl::StrCat(field, ": ", unknown.message()));
}

}  // namespace structkv::transport
