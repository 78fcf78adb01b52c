// A model's attention geometry for people.
#pragma once

#include <string>

#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// "32 query and 8 KV heads of 128"; head sizes of values are told where they differ, and where
// values are a part of the keys: "128 query and 1 KV heads of 576, values in the first 512".
std::string HeadsText(const v1::ModelGeometry& geometry);

}  // namespace structkv::cli
