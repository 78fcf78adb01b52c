// Cuts a slice of a held cache into messages, one at a time.
#pragma once

#include <cstdint>

#include "grpcpp/support/byte_buffer.h"
#include "service/engine/buffer_pool.h"
#include "service/session/held_slice.h"
#include "structkv/v1/held_cache.pb.h"

namespace structkv::rpc {

// `CacheInfo` of a slice.
v1::CacheInfo EncodeInfo(const session::HeldSlice& slice);

// Not thread-safe.
class FetchBuilder {
 public:
  struct Options {
    int64_t max_message_bytes = 0;  // kMinMessageBytes or more; no message is longer
    int64_t skip_bytes = 0;         // 0 to the slice's total_bytes()
    bool checksums = false;
  };

  // Tensors that are not contiguous are arranged in buffers of `buffers`, which outlives this; the
  // others are sent from where they lie.
  FetchBuilder(session::HeldSlice slice, const Options& options, engine::BufferPool* buffers);

  // The next message: `info`, layers, `summary`.
  grpc::ByteBuffer Next();
  // Whether the summary was the last one.
  bool done() const { return state_ == State::kDone; }
  int64_t sent_bytes() const { return sent_bytes_; }
  const session::HeldSlice& slice() const { return slice_; }

 private:
  enum class State : uint8_t { kInfo, kLayers, kSummary, kDone };

  grpc::ByteBuffer NextLayer();
  grpc::ByteBuffer Summary() const;
  // Passes layers and tensors that lie before `skip_bytes`.
  void Skip(int64_t bytes);

  const session::HeldSlice slice_;
  const Options options_;
  engine::BufferPool* const buffers_;
  State state_ = State::kInfo;
  // Where the next piece starts.
  int64_t layer_;
  size_t tensor_ = 0;
  int64_t offset_ = 0;
  bool layer_begun_ = false;  // a message of it was sent
  int64_t sent_bytes_ = 0;
};

}  // namespace structkv::rpc
