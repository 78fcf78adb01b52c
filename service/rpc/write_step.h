// What a stream that only writes does next.
#pragma once

#include <cstdint>

#include "grpcpp/support/byte_buffer.h"

namespace structkv::rpc {

struct WriteStep {
  enum class Kind : uint8_t {
    kWrite,      // `bytes`
    kWriteLast,  // and the stream ends with OK after it
    kAgain,      // nothing; another step follows, unless the stream ends
    kWait,       // nothing, until it is woken
  };
  Kind kind = Kind::kWrite;
  grpc::ByteBuffer bytes;
};

}  // namespace structkv::rpc
