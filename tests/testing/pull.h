// A worker that sends rows of keys and values only when it is asked for them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "structkv/v1/compression.pb.h"
#include "tests/testing/call.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

// The rows of a tensor of `data` that a pull asks for, in the layout of its `Open`. `positions` is
// [kept] or, where `per_head`, [kv_heads, kept]; tokens of the prompt.
std::string PulledRows(const PromptData& data, uint32_t layer, v1::Tensor tensor,
                       const std::vector<int32_t>& positions, bool per_head);

// One prompt with `open.pull`. `data` is that of the same prompt without it.
class PullWorker {
 public:
  PullWorker(Call* call, const PromptData* data, v1::Pull pull);

  v1::CompressRequest OpenMessage(uint32_t layers_in_flight) const;
  // What the server decides by.
  v1::CompressRequest LayerMessage(uint32_t layer) const;
  // The rows for a pull, each tensor cut into about seven pieces, the last ones first.
  v1::CompressRequest RowsMessage(uint32_t layer, const std::vector<int32_t>& positions) const;

  void SendLayer(uint32_t layer);
  // Waits for the layer's pull and answers it. False where the stream ended.
  bool AnswerPull(uint32_t layer);
  // Bytes sent by both.
  uint64_t sent_bytes() const { return sent_bytes_; }

 private:
  bool Pulls(v1::Tensor tensor) const;

  Call& call_;
  const PromptData& data_;
  const v1::Pull pull_;
  uint64_t sent_bytes_ = 0;
};

// Sends all of a prompt, `layers_in_flight` layers before the first pull is answered, those of a
// window in descending order, and waits for the end.
Outcome RunWithPull(const std::shared_ptr<grpc::Channel>& channel, const PromptData& data,
                    v1::Pull pull, uint32_t layers_in_flight);

}  // namespace structkv::testkit
