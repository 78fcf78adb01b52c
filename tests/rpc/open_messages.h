// A valid `Open` that tests change one field of.
#pragma once

#include "structkv/v1/compression.pb.h"

namespace structkv::rpc {

// Eight layers, with every default.
inline v1::Open ValidOpen() {
  v1::Open open;
  open.mutable_geometry()->set_layer_count(8);
  open.mutable_geometry()->set_query_head_count(4);
  open.mutable_geometry()->set_kv_head_count(2);
  open.mutable_geometry()->set_key_dim(64);
  open.set_prompt_tokens(1000);
  open.set_dtype(v1::DTYPE_BF16);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  return open;
}

}  // namespace structkv::rpc
