// What the ranks of a shard group must say alike in their `Open`.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "service/rpc/open_decoder.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::rpc {

// Every field of `open` by name, with its value in force where it has a default, but for what is a
// rank's own: its index and heads, transports with their regions, idempotency_key,
// max_response_message_bytes. Sorted by name.
// `request` is what DecodeOpen made of it. Fields that a later version adds are in it by
// themselves.
std::vector<std::pair<std::string, std::string>> AgreedFields(const v1::Open& open,
                                                              const OpenRequest& request);

}  // namespace structkv::rpc
