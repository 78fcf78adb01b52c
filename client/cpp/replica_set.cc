#include "client/cpp/replica_set.h"

#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "client/cpp/credentials.h"
#include "client/cpp/replica_set_core.h"
#include "structkv/sizes.h"

namespace structkv::client::internal {

absl::Status AtReplica(const std::string& address, const absl::Status& status) {
  if (status.ok() || address.empty()) return status;
  absl::Status named(status.code(), absl::StrCat(address, ": ", status.message()));
  status.ForEachPayload([&named](absl::string_view type, const absl::Cord& payload) {
    named.SetPayload(type, payload);
  });
  return named;
}

uint64_t EstimatedBytes(const v1::Open& open) {
  v1::Opened opened;
  opened.add_required_tensors(v1::TENSOR_KEYS);
  opened.add_required_tensors(v1::TENSOR_VALUES);
  const uint64_t layers = open.layers_in_flight() == 0 ? 2 : open.layers_in_flight();
  return layers * (InputTensorBytes(open, opened, v1::TENSOR_KEYS) +
                   InputTensorBytes(open, opened, v1::TENSOR_VALUES));
}

Placement::Placement(std::shared_ptr<ReplicaSetCore> core, std::shared_ptr<Replica> replica,
                     uint64_t bytes)
    : core_(std::move(core)), replica_(std::move(replica)) {
  if (core_ != nullptr) number_ = core_->Begin(replica_->address, bytes);
}

Placement::~Placement() { OnEnd(absl::OkStatus()); }

void Placement::OnOpened(uint64_t reserved_bytes) {
  if (core_ != nullptr) core_->Open(number_, reserved_bytes);
}

void Placement::OnEnd(const absl::Status& status) {
  if (core_ != nullptr) core_->End(number_, replica_->address, status);
}

absl::StatusOr<std::unique_ptr<ReplicaSet>> ReplicaSet::Connect(const std::string& target,
                                                                const ClientOptions& options) {
  const bool resolves = options.replicas.resolve != nullptr;
  absl::StatusOr<Target> parsed = resolves ? Target() : ParseTarget(target);
  if (!parsed.ok()) return parsed.status();
  const bool several = resolves || parsed->several();
  // Now, and not with the first prompt, is the time to say what a token lacks.
  for (const std::vector<std::string>* all : {&parsed->fixed, &parsed->names}) {
    for (const std::string& address : *all) {
      const absl::Status status = CredentialsFor(address, options).status();
      if (!status.ok()) return status;
    }
  }
  const std::string address = several ? "" : parsed->fixed.front();
  auto core = std::make_shared<ReplicaSetCore>(target, *std::move(parsed), options);
  auto set = std::unique_ptr<ReplicaSet>(new ReplicaSet(std::move(core)));
  if (several) return set;
  auto only = MakeReplica(address, "", /*several=*/false, options);
  if (!only.ok()) return only.status();
  set->only_ = *std::move(only);
  return set;
}

ReplicaSet::ReplicaSet(std::shared_ptr<ReplicaSetCore> core) : core_(std::move(core)) {}

ReplicaSet::ReplicaSet(std::shared_ptr<grpc::Channel> channel, const ClientOptions& options)
    : only_(std::make_shared<Replica>()) {
  only_->transports = std::make_unique<TransportChooser>(channel, options.own_process);
  only_->channel = std::move(channel);
}

ReplicaSet::~ReplicaSet() = default;

bool ReplicaSet::several() const { return only_ == nullptr; }

absl::StatusOr<std::shared_ptr<Replica>> ReplicaSet::Choose(const PlacementRequest& request,
                                                            absl::Time deadline) {
  if (only_ != nullptr) return only_;
  return core_->Choose(request, deadline);
}

std::shared_ptr<Placement> ReplicaSet::Place(std::shared_ptr<Replica> replica, uint64_t bytes) {
  return std::make_shared<Placement>(several() ? core_ : nullptr, std::move(replica), bytes);
}

absl::StatusOr<std::shared_ptr<Replica>> ReplicaSet::At(const std::string& address,
                                                        absl::Time deadline) {
  if (only_ != nullptr && only_->address == address) return only_;
  if (core_ == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "replica is ", address, ", and the client was made for one channel; Connect() allows it"));
  }
  return core_->At(address, deadline);
}

absl::StatusOr<std::vector<std::shared_ptr<Replica>>> ReplicaSet::All(absl::Time deadline) {
  if (only_ != nullptr) return std::vector<std::shared_ptr<Replica>>{only_};
  return core_->All(deadline);
}

std::vector<ReplicaState> ReplicaSet::Report() const {
  if (several()) return core_->Report();
  std::vector<ReplicaState> states(1);
  states[0].address = only_->address;
  return states;
}

}  // namespace structkv::client::internal
