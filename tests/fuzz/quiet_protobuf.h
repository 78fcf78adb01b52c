// Keeps protobuf's own lines about bad input out of a fuzzer's output.
#pragma once

#include "google/protobuf/stubs/logging.h"

namespace structkv::fuzz {

inline google::protobuf::LogHandler* const kNoLog = google::protobuf::SetLogHandler(nullptr);

}  // namespace structkv::fuzz
