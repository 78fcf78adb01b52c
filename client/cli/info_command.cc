#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "client/cli/commands.h"
#include "client/cli/compressor.h"
#include "client/cli/safetensors.h"
#include "client/cli/text.h"
#include "google/protobuf/util/json_util.h"
#include "nlohmann/json.hpp"

namespace structkv::cli {
namespace {

struct InfoFlags {
  std::string input;
  ConnectionFlags connection;
  bool json = false;
};

// What kind of file it is, told by its tensors and metadata.
std::string Kind(const SafetensorsFile& file) {
  if (file.Find("layer.0.positions") != nullptr) {
    return file.Find("layer.0.k") != nullptr ? "compacted cache" : "compaction plan";
  }
  if (file.Find("layer.0.k") != nullptr && file.metadata().count("prompt_tokens") > 0) {
    return "captured prefill";
  }
  return "safetensors file";
}

// "layer.7.k" -> "layer.*.k"
std::string Generalised(const std::string& name) {
  constexpr std::string_view kPrefix = "layer.";
  if (name.compare(0, kPrefix.size(), kPrefix) != 0) return name;
  const size_t dot = name.find('.', kPrefix.size());
  if (dot == std::string::npos) return name;
  return absl::StrCat("layer.*", name.substr(dot));
}

void PrintFile(const SafetensorsFile& file) {
  uint64_t bytes = 0;
  for (const auto& [name, info] : file.tensors()) bytes += info.size_bytes();
  std::printf("%s: %s, %zu tensors, %s\n", file.path().c_str(), Kind(file).c_str(),
              file.tensors().size(), BytesText(bytes).c_str());
  if (!file.metadata().empty()) std::printf("\n");
  size_t width = 0;
  for (const auto& [key, value] : file.metadata()) width = std::max(width, key.size());
  for (const auto& [key, value] : file.metadata()) {
    std::printf("  %-*s  %s\n", static_cast<int>(width), key.c_str(), value.c_str());
  }
  // One row for each kind of tensor, dtype and shape.
  std::map<std::string, std::pair<size_t, uint64_t>> rows;
  for (const auto& [name, info] : file.tensors()) {
    auto& [count, total] =
        rows[absl::StrCat(Generalised(name), "\t", info.dtype, "\t", ShapeText(info.shape))];
    ++count;
    total += info.size_bytes();
  }
  Table table({"tensor", "dtype", "shape", "count", "bytes"});
  for (const auto& [row, totals] : rows) {
    std::vector<std::string> cells;
    for (size_t begin = 0, end = 0; begin <= row.size(); begin = end + 1) {
      end = std::min(row.find('\t', begin), row.size());
      cells.push_back(row.substr(begin, end - begin));
    }
    cells.push_back(CountText(totals.first));
    cells.push_back(CountText(totals.second));
    table.Add(std::move(cells));
  }
  std::printf("\n%s", table.Text("  ").c_str());
}

void PrintFileJson(const SafetensorsFile& file) {
  nlohmann::ordered_json json;
  json["path"] = file.path();
  json["kind"] = Kind(file);
  json["metadata"] = file.metadata();
  json["tensors"] = nlohmann::ordered_json::object();
  for (const auto& [name, info] : file.tensors()) {
    json["tensors"][name] = {
        {"dtype", info.dtype}, {"shape", info.shape}, {"bytes", info.size_bytes()}};
  }
  std::printf("%s\n", json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
}

// The values of a repeated enum without their prefix, in lower case.
template <typename Values, typename Name>
std::string EnumList(const Values& values, const char* prefix, Name name) {
  std::vector<std::string> names;
  for (int value : values) {
    names.push_back(absl::AsciiStrToLower(absl::StripPrefix(name(value), prefix)));
  }
  return absl::StrJoin(names, ", ");
}

const char* HealthText(client::ReplicaState::Health health) {
  switch (health) {
    case client::ReplicaState::Health::kReady:
      return "ready";
    case client::ReplicaState::Health::kDraining:
      return "draining";
    case client::ReplicaState::Health::kFailed:
      return "failed";
    case client::ReplicaState::Health::kUnknown:
      break;
  }
  return "not asked yet";
}

void PrintReplicas(const std::vector<client::ReplicaState>& replicas) {
  if (replicas.size() < 2) return;
  std::printf("\n");
  Table table({"replica", "health", "sessions", "reserved"});
  for (const client::ReplicaState& replica : replicas) {
    table.Add(
        {replica.address, HealthText(replica.health), CountText(replica.active_sessions),
         absl::StrCat(BytesText(replica.reserved_bytes), " of ", BytesText(replica.limit_bytes))});
  }
  std::printf("%s", table.Text("  ").c_str());
  for (const client::ReplicaState& replica : replicas) {
    if (replica.failure.ok()) continue;
    std::printf("  %s: %s\n", replica.address.c_str(),
                std::string(replica.failure.message()).c_str());
  }
}

void PrintServer(const Compressor& compressor, const v1::GetCapabilitiesResponse& caps) {
  std::printf("%s: structkv %s\n\n", compressor.description().c_str(), caps.version().c_str());
  for (const v1::BackendInfo& backend : caps.backends()) {
    std::printf(
        "  backend       %s (%s)\n", backend.name().c_str(),
        backend.devices().empty() ? "not in use" : absl::StrJoin(backend.devices(), ", ").c_str());
  }
  const auto line = [](const char* name, const std::string& value) {
    std::printf("  %-12s  %s\n", name, value.c_str());
  };
  line("methods", absl::StrJoin(caps.methods(), ", "));
  line("dtypes", EnumList(caps.dtypes(), "DTYPE_",
                          [](int v) { return v1::DType_Name(static_cast<v1::DType>(v)); }));
  line("layouts", EnumList(caps.layouts(), "LAYOUT_",
                           [](int v) { return v1::Layout_Name(static_cast<v1::Layout>(v)); }));
  line("statistics", EnumList(caps.statistics(), "STATISTIC_", [](int v) {
         return v1::Statistic_Name(static_cast<v1::Statistic>(v));
       }));
  line("pivot modes", EnumList(caps.pivot_modes(), "PIVOT_MODE_", [](int v) {
         return v1::PivotMode_Name(static_cast<v1::PivotMode>(v));
       }));
  line("transports", absl::StrJoin(caps.transports(), ", "));
  if (!caps.region_socket().empty()) line("regions", caps.region_socket());
  std::string dims = absl::StrCat(caps.key_dims().min(), " to ", caps.key_dims().max(),
                                  " in steps of ", caps.key_dims().step());
  for (uint32_t extra : caps.key_dims().extra()) absl::StrAppend(&dims, ", ", extra);
  line("head sizes", dims);
  if (caps.has_block_tokens()) {
    line("blocks", absl::StrCat(caps.block_tokens().min(), " to ", caps.block_tokens().max(),
                                " tokens in steps of ", caps.block_tokens().step()));
  }
  const v1::Limits& limits = caps.limits();
  std::string most =
      absl::StrCat(CountText(limits.max_prompt_tokens()), " tokens, ",
                   CountText(limits.max_layers()), " layers, ", CountText(limits.max_heads()),
                   " heads, window of ", CountText(limits.max_window_tokens()));
  // In this process there are no messages, no sessions and no budget.
  const bool server = limits.max_message_bytes() > 0;
  if (server) {
    absl::StrAppend(&most, ", messages of ", BytesText(limits.max_message_bytes()), ", ",
                    CountText(limits.max_sessions()), " sessions");
  }
  line("limits", most);
  if (!server) return;
  line("memory", absl::StrCat(BytesText(limits.memory_available_bytes()), " of ",
                              BytesText(limits.memory_budget_bytes()), " free"));
  if (limits.hold_budget_bytes() == 0) return;
  line("held caches", absl::StrCat(BytesText(limits.hold_available_bytes()), " of ",
                                   BytesText(limits.hold_budget_bytes()), " free"));
}

absl::Status RunInfo(const InfoFlags& flags) {
  if (!flags.input.empty()) {
    absl::StatusOr<std::shared_ptr<const SafetensorsFile>> file =
        SafetensorsFile::Open(flags.input);
    if (!file.ok()) return file.status();
    if (flags.json) {
      PrintFileJson(**file);
    } else {
      PrintFile(**file);
    }
    return absl::OkStatus();
  }
  absl::StatusOr<std::unique_ptr<Compressor>> compressor = MakeCompressor(flags.connection);
  if (!compressor.ok()) return compressor.status();
  absl::StatusOr<v1::GetCapabilitiesResponse> capabilities = (*compressor)->GetCapabilities();
  if (!capabilities.ok()) return capabilities.status();
  if (!flags.json) {
    PrintServer(**compressor, *capabilities);
    PrintReplicas((*compressor)->Replicas());
    return absl::OkStatus();
  }
  std::string json;
  google::protobuf::util::JsonPrintOptions print;
  print.add_whitespace = true;
  print.preserve_proto_field_names = true;
  print.always_print_primitive_fields = true;
  if (!google::protobuf::util::MessageToJsonString(*capabilities, &json, print).ok()) {
    return absl::InternalError("cannot print the capabilities as JSON");
  }
  std::fputs(json.c_str(), stdout);
  return absl::OkStatus();
}

}  // namespace

Command AddInfo(CLI::App* app) {
  auto flags = std::make_shared<InfoFlags>();
  CLI::App* sub =
      app->add_subcommand("info", "Say what a file is, or, without one, what a server can do");
  sub->add_option("file", flags->input, "A safetensors file");
  AddConnectionFlags(sub, &flags->connection);
  sub->add_flag("--json", flags->json, "Print JSON");
  return {sub, [flags] { return RunInfo(*flags); }};
}

}  // namespace structkv::cli
