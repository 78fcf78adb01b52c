// The method and its parameters as command-line flags, and back as text.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "google/protobuf/message.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// Unset: the method's default, which the service knows.
struct MethodFlags {
  std::string method = "structkv";
  std::optional<double> kv_budget;
  std::optional<std::string> budget_kind;
  std::optional<uint32_t> window;
  std::optional<std::string> granularity;
  std::optional<std::string> pooling;
  std::optional<uint32_t> pooling_kernel;
  std::optional<uint32_t> sinks;
  std::optional<double> decay;
  std::optional<double> skeleton_budget;
  std::optional<std::string> skeleton_budget_kind;
  std::optional<std::string> pivot;
  std::optional<uint32_t> pivot_layer;
  std::optional<double> sparsity_ratio;
  std::optional<std::vector<double>> pivot_weights;
  std::optional<std::vector<double>> pivot_search;
  std::optional<uint32_t> pivot_patience;
  std::optional<double> pivot_deadline;
  std::optional<double> pivot_score;
  std::optional<uint32_t> profile_prompts;
  std::optional<std::string> window_reduce;
  std::optional<std::string> group_reduce;
  std::optional<double> beta;
  std::optional<uint32_t> tsp_layer;
  std::optional<uint32_t> filter_layer;
  std::optional<double> recent_share;
};

// Names of the methods, as in `Method.kind`.
const std::vector<std::string>& MethodNames();

void AddMethodFlags(CLI::App* app, MethodFlags* flags);

// INVALID_ARGUMENT names a flag that the method does not have.
absl::StatusOr<v1::Method> BuildMethod(const MethodFlags& flags);

// A method with every parameter, flat: {"method": "structkv", "method.kv_budget.ratio": "0.1",
// ...}.
std::map<std::string, std::string> MethodMetadata(const v1::Method& method);

// A message's set fields, flat: {"prefix.kv_budget.ratio": "0.1", ...}. Enums by their short names.
void Flatten(const google::protobuf::Message& message, const std::string& prefix,
             std::map<std::string, std::string>* out);

// "exact", "online" and so on.
std::string PivotModeText(v1::PivotMode mode);

// The name of the method's kind, for instance "structkv"; empty where none is set.
std::string MethodKind(const v1::Method& method);

// Shortest decimal text that reads back as `value`.
std::string NumberText(double value);

}  // namespace structkv::cli
