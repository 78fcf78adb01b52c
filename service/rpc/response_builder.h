// Cuts answers into messages no longer than the caller accepts, without copying their tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "grpcpp/support/byte_buffer.h"
#include "service/engine/prompt.h"

namespace structkv::rpc {

// An encoded `CompressResponse`. Its memory is referred to by `bytes` alone.
struct OutgoingMessage {
  grpc::ByteBuffer bytes;
  // Bytes of tensor data in it.
  int64_t tensor_bytes = 0;
  // Of a batch.
  uint32_t prompt = 0;
};

// `max_message_bytes`: kMinMessageBytes or more; no message is longer. What fits goes into one
// message.
std::vector<OutgoingMessage> BuildLayer(engine::LayerOutput output, int64_t max_message_bytes,
                                        uint32_t prompt = 0);
std::vector<OutgoingMessage> BuildPivot(engine::PivotResult result, int64_t max_message_bytes,
                                        uint32_t prompt = 0);
std::vector<OutgoingMessage> BuildPull(engine::RowPull pull, int64_t max_message_bytes,
                                       uint32_t prompt = 0);

}  // namespace structkv::rpc
