// Cuts answers into messages no longer than the caller accepts, without copying their tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "grpcpp/support/byte_buffer.h"
#include "service/engine/prompt.h"
#include "service/transport/transport.h"

namespace structkv::rpc {

// An encoded `CompressResponse`. Its memory is referred to by `bytes` alone.
struct OutgoingMessage {
  grpc::ByteBuffer bytes;
  // Bytes of tensor data in it.
  int64_t tensor_bytes = 0;
  // Bytes of tensors that it says are in regions, or go by transfers.
  int64_t elsewhere_bytes = 0;
  // Of a batch.
  uint32_t prompt = 0;
  // Whether it is the prompt's last one.
  bool ends_prompt = false;
};

// `max_message_bytes`: kMinMessageBytes or more; no message is longer. What fits goes into one
// message. Of rows that lie in `place` it is said where they are, or by which transfer they go.
std::vector<OutgoingMessage> BuildLayer(engine::LayerOutput output, int64_t max_message_bytes,
                                        uint32_t prompt = 0,
                                        const transport::ResultPlace& place = {});
std::vector<OutgoingMessage> BuildPivot(engine::PivotResult result, int64_t max_message_bytes,
                                        uint32_t prompt = 0);
std::vector<OutgoingMessage> BuildPull(engine::RowPull pull, int64_t max_message_bytes,
                                       uint32_t prompt = 0);

}  // namespace structkv::rpc
