#include "service/engine/rerotation.h"

#include "service/method/rotary.h"

namespace structkv::engine {

Rerotation::Rerotation(const PromptSpec& spec)
    : pairing_(spec.rotary->pairing),
      offset_(spec.rotary->offset),
      end_(spec.largest_kept_tokens()),
      from_(method::InverseFrequencies(*spec.rotary, spec.prompt_tokens)),
      to_(method::InverseFrequencies(*spec.rotary, end_)) {}

int64_t Rerotation::StateBytes(const PromptSpec& spec) {
  if (!spec.rotary.has_value()) return 0;
  return 2 * spec.rotary->pairs() * static_cast<int64_t>(sizeof(float));
}

LayerRotation Rerotation::ForLayer(absl::Span<const int32_t> rows, int64_t kept, int64_t tokens,
                                   absl::Span<const int32_t> held) const {
  LayerRotation rotation;
  rotation.params = {.pairing = pairing_,
                     .offset = offset_,
                     .pairs = static_cast<int64_t>(from_.size()),
                     .from = from_.data(),
                     .to = to_.data(),
                     .positions = rows.data(),
                     .first_position = end_ - kept};
  rotation.moves =
      kept != tokens || !held.empty() || rotation.params.first_position != 0 || from_ != to_;
  if (!held.empty()) {
    rotation.originals.reserve(rows.size());
    for (int32_t row : rows) rotation.originals.push_back(held[row]);
    rotation.params.positions = rotation.originals.data();
  }
  return rotation;
}

}  // namespace structkv::engine
