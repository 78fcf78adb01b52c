#include "service/transport/transport.h"

namespace structkv::transport {
namespace {

class Inline final : public Transport {
 public:
  Kind kind() const override { return Kind::kInline; }
  bool in_place() const override { return false; }

  absl::StatusOr<engine::Buffer> Resolve(const RegionRange& /*range*/) const override {
    return absl::InvalidArgumentError(
        "the piece has a `range`; the prompt's transport is inline, which takes `data` alone");
  }
  absl::StatusOr<engine::Buffer> ResolveInPlace(const RegionRange& range) const override {
    return Resolve(range);
  }
  bool gives_room() const override { return false; }
  void GiveRoom(engine::LayerInput* /*input*/) const override {}
  ResultPlace result_place() const override { return {}; }
  absl::Status Check() const override { return absl::OkStatus(); }
};

}  // namespace

const std::shared_ptr<Transport>& InlineTransport() {
  static const auto* const transport = new std::shared_ptr<Transport>(new Inline());
  return *transport;
}

}  // namespace structkv::transport
