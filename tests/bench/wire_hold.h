// What it costs to leave a cache in the server and to fetch it, beside the least that it could.
#pragma once

#include <string>

#include "nlohmann/json.hpp"
#include "tests/bench/wire_stream.h"

namespace structkv::bench {

struct HoldAddresses {
  std::string bare;
  std::string held;
  int64_t server_pid = 0;
};

// `repeats` rounds, after one to warm up: a cache is sent, held and fetched, each beside a bare
// stream that carries as many bytes the same way; a prompt of as many bytes of which little is
// kept; and a fetch into shared memory beside a copy of as many bytes in this process.
nlohmann::json MeasureHold(const HoldAddresses& addresses, const StreamOptions& options,
                           int repeats);
void PrintHold(const std::string& socket, const nlohmann::json& result);
// Whether holding, and fetching in messages, reach `share` of their floors.
bool HoldPasses(const nlohmann::json& result, double share);

}  // namespace structkv::bench
