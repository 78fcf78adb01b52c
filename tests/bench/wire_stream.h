// Throughput of one stream in both directions at once.
#pragma once

#include <cstdint>
#include <string>

namespace structkv::bench {

struct StreamOptions {
  uint64_t total_bytes = uint64_t{1} << 30;  // each way
  uint64_t chunk_bytes = uint64_t{4} << 20;  // of tensor data per message
};

// Seconds from the first byte sent to the last byte and the status received. Ends the program on an
// error.
double BareStreamSeconds(const std::string& address, const StreamOptions& options);
// The same bytes through Compress with the method Full: keys and values of 32 layers there and
// back, counted. The session's opening is not part of the time.
double CompressStreamSeconds(const std::string& address, const StreamOptions& options);

}  // namespace structkv::bench
