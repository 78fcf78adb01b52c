#include "tests/bench/wire_copies.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "tests/bench/wire_peer.h"
#include "tests/testing/process.h"

namespace structkv::bench {
namespace {

// The entries of both are alike; those that have copies are rows.
void Merge(const nlohmann::json& from, nlohmann::json* to) {
  if (from.is_object() && from.value("way", "") != to->value("way", "")) return;
  for (const char* key : {kCopiesKey, kSocketKey}) {
    if (from.contains(key)) (*to)[key] = from[key];
  }
  for (const auto& [key, entry] : from.items()) {
    if (!entry.is_structured()) continue;
    if (to->is_array()) {
      Merge(entry, &to->at(std::stoul(key)));
    } else if (to->contains(key)) {
      Merge(entry, &(*to)[key]);
    }
  }
}

}  // namespace

void AddCopies(const Copies& copies, double tensor_bytes, nlohmann::json* row) {
  (*row)[kCopiesKey] = static_cast<double>(copies.all()) / tensor_bytes;
  (*row)[kSocketKey] = static_cast<double>(copies.sent) / tensor_bytes;
}

std::string CopiesText(const nlohmann::json& row, const char* key) {
  if (!row.contains(key)) return "-";
  char text[32];
  std::snprintf(text, sizeof(text), "%.3f", row[key].get<double>());
  return text;
}

void AddCountedCopies(const std::vector<std::string>& command, nlohmann::json* report) {
  const testkit::TemporaryDirectory directory;
  const std::string page = directory.Path("copies");
  std::ofstream(page) << std::string(sizeof(CopyPage), '\0');
  setenv(kCopyCountFile, page.c_str(), /*overwrite=*/1);
  testkit::Process process(command);
  unsetenv(kCopyCountFile);
  const auto code = process.Wait(std::chrono::minutes(10));
  if (code != 0) Die("counting copies: " + process.error());
  const auto counted = nlohmann::json::parse(process.output(), nullptr, /*allow_exceptions=*/false);
  if (counted.is_discarded()) Die("counting copies: no JSON: " + process.output());
  Merge(counted, report);
}

}  // namespace structkv::bench
