// A YAML file as a source of options for CLI11.
#pragma once

#include <istream>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"

namespace structkv {

// One mapping from an option's long name, without dashes in front, to a scalar or a list of
// scalars. A key that is no option is refused by name, with the closest one if there is a close
// one. Errors are CLI::ConfigError.
class YamlConfig : public CLI::Config {
 public:
  // Options that the file may set. `overridden`: those that the environment sets, which goes first;
  // the file's values for them are skipped.
  YamlConfig(std::vector<std::string> known, std::set<std::string> overridden)
      : known_(std::move(known)), overridden_(std::move(overridden)) {}

  std::string to_config(const CLI::App* app, bool default_also, bool write_description,
                        std::string prefix) const override;
  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override;

  // "line 3: " where the file that was read has a value of that option, else empty.
  std::string WhereIs(const std::string& name) const;

 private:
  const std::vector<std::string> known_;
  const std::set<std::string> overridden_;
  mutable std::map<std::string, std::string> where_;  // of the options that were read
};

// The name closest to `name`, at most a third of its letters away; empty where none is.
std::string ClosestName(const std::string& name, const std::vector<std::string>& known);

}  // namespace structkv
