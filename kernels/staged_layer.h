// A layer's keys on their way to where the layer is to be computed, ahead of the call that does.
#pragma once

namespace structkv {

// What Backend::Stage has begun. The keys stay as they are in the host's memory until it is
// destroyed, which waits until they have been read. Does not outlive its backend.
class StagedLayer {
 public:
  virtual ~StagedLayer() = default;
};

}  // namespace structkv
