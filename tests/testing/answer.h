// The answers of a stream put together, held to the order that the proto promises, and compared
// with the oracle.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "structkv/v1/compression.pb.h"
#include "tests/testing/call.h"
#include "tests/testing/oracle.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

struct LayerAnswer {
  uint32_t kept_tokens = 0;
  uint32_t kept_blocks = 0;
  std::optional<v1::LayerMetrics> metrics;
  std::map<v1::Tensor, std::string> tensors;
};

struct PivotAnswer {
  v1::PivotDecision decision;  // without pieces
  std::map<v1::Tensor, std::string> tensors;
};

// Rows that were asked for.
struct PullAnswer {
  v1::RowPull pull;       // without pieces
  std::string positions;  // int32
};

struct Answer {
  std::optional<v1::Opened> opened;
  std::map<uint32_t, PullAnswer> pulls;
  std::map<uint32_t, LayerAnswer> layers;
  std::vector<uint32_t> order;  // of the layers' answers
  std::optional<PivotAnswer> pivot;
  size_t layers_before_pivot = 0;
  std::optional<v1::Summary> summary;
  // What broke the promised order, one line each; empty for a good stream.
  std::vector<std::string> faults;
};

Answer Assemble(const Outcome& outcome);

// A canonical form of everything that the prompt's result consists of: positions, tensors, metrics,
// pivot. Free of times, identifiers, the cut into messages, and pulls.
std::string ResultBytes(const Answer& answer);

// Compares a whole answer with the oracle: opened, positions, gathered bytes, metrics, pivot,
// skeleton, summary. Returns what differs, one line each. With a statistic given by the worker and
// no mean over a kernel the positions must be equal; otherwise two tokens may change places where
// their scores agree to `kScoreTolerance` of the highest.
inline constexpr double kScoreTolerance = 1e-4;
std::vector<std::string> CompareWithOracle(const PromptData& data, const Answer& answer);

// Likewise for the layers and the pivot alone, which is all that the engine answers.
std::vector<std::string> CompareResultsWithOracle(const PromptData& data, const Answer& answer);

// Numbers of a tensor of 4-byte elements.
std::vector<int32_t> AsInts(const std::string& bytes);
std::vector<float> AsFloats(const std::string& bytes);

}  // namespace structkv::testkit
