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

// One way alone, in messages of a chunk each: to the bare service, and from it.
double BareUploadSeconds(const std::string& address, const StreamOptions& options);
double BareDownloadSeconds(const std::string& address, const StreamOptions& options);
// The same bytes through Compress to the server, which keeps and returns a few tokens of each
// layer.
double SendSeconds(const std::string& address, const StreamOptions& options);
// The same bytes to the server, to be held: as CompressStreamSeconds, with positions alone back.
double HoldSeconds(const std::string& address, const StreamOptions& options, std::string* handle);
// And from there, all of it, counted. Releases the cache afterwards.
double FetchSeconds(const std::string& address, const StreamOptions& options,
                    const std::string& handle);

}  // namespace structkv::bench
