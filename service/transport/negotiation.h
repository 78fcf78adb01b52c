// Which transport a prompt gets.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "service/transport/transport.h"

namespace structkv::transport {

// What a prompt asks for.
struct TransportRequest {
  std::vector<Kind> wishes;  // best first; empty: inline
  std::vector<std::string> regions;
  uint64_t nccl_pair = 0;
  std::optional<RegionRange> results;
  std::string tenant;
  // Where these are fields, for errors: with its dot; of a call of its own empty.
  std::string message = "open.";
};

// Sizes of the tensors that come and of the rows that go back.
struct PromptSizes {
  int64_t layers = 0;
  int64_t layers_in_flight = 0;
  // Of a full layer as it comes; 0 for what does not come.
  int64_t input_key_bytes = 0;
  int64_t input_value_bytes = 0;
  // Of the layer that keeps most; both 0 for a plan, values also where they are a part of the keys.
  int64_t key_bytes = 0;
  int64_t value_bytes = 0;
  bool pulled = false;  // the client sends the rows that are kept, once it is told which
  bool held = false;    // the rows that are kept stay in the service
};

// Grants a transport. FAILED_PRECONDITION: it cannot be had, and the next wish may be tried; any
// other status is the prompt's fault.
using Grant = std::function<absl::StatusOr<std::shared_ptr<Transport>>(
    const TransportRequest& request, const PromptSizes& sizes)>;

// What a server has beside inline; of what it was told to have and has not, why.
using Offers = std::map<Kind, absl::StatusOr<Grant>>;

struct Granted {
  std::shared_ptr<Transport> transport;
  std::string reason;  // why not the wishes before it
};

// The first wish that can be granted. FAILED_PRECONDITION, with the reason of each, where none can
// be; also what a Grant returns.
absl::StatusOr<Granted> Negotiate(const TransportRequest& request, const PromptSizes& sizes,
                                  const Offers& offers);

}  // namespace structkv::transport
