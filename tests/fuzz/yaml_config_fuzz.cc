// Any text as a configuration file: options of known names, each once, or a CLI::ConfigError.
#include <set>
#include <sstream>
#include <string>

#include "service/yaml_config.h"
#include "tests/fuzz/fuzz_input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<std::string> known = {"listen", "threads", "memory-budget", "backend"};
  static const std::set<std::string> overridden = {"backend"};
  std::istringstream text(std::string(reinterpret_cast<const char*>(data), size));
  try {
    std::set<std::string> seen;
    for (const CLI::ConfigItem& item : structkv::YamlConfig(known, overridden).from_config(text)) {
      FUZZ_CHECK(std::find(known.begin(), known.end(), item.name) != known.end());
      FUZZ_CHECK(!overridden.contains(item.name));
      FUZZ_CHECK(seen.insert(item.name).second);
      FUZZ_CHECK(item.parents.empty());
    }
  } catch (const CLI::ConfigError& error) {
    FUZZ_CHECK(error.get_exit_code() != 0);
    FUZZ_CHECK(std::string(error.what()) != "");
  }
  return 0;
}
