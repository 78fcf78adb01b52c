// A worker that cuts its prefill at the pivot.
#pragma once

#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "tests/testing/call.h"
#include "tests/testing/oracle.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

// Sends a prompt layer by layer, each once the one before was answered; from where the oracle
// allows it, skeleton rows alone, which `data` then holds. The skeleton is the server's own, as it
// came before the next layer was sent.
inline Outcome SendCut(const std::shared_ptr<grpc::Channel>& channel, PromptData* data) {
  const Oracle oracle(*data);
  const uint32_t from = oracle.pivot->skeleton_from.value_or(data->layers());
  Call call(channel);
  call.Send(OpenMessage(data->open()));
  for (uint32_t layer = 0; layer < data->layers(); ++layer) {
    if (layer >= from) {
      const std::vector<int32_t> skeleton = call.Skeleton();
      EXPECT_FALSE(skeleton.empty()) << "no pivot before layer " << layer;
      if (skeleton.empty()) break;
      data->KeepRows(layer, skeleton);
    }
    call.Send(LayerMessage(*data, layer));
    EXPECT_TRUE(call.WaitForLayer(layer)) << layer;
  }
  call.Send(CommitMessage(*data));
  call.HalfClose();
  return call.Finish();
}

}  // namespace structkv::testkit
