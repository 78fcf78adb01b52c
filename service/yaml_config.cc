#include "service/yaml_config.h"

#include <algorithm>
#include <numeric>
#include <sstream>

#include "yaml-cpp/yaml.h"

namespace structkv {
namespace {

// Letters to insert, delete or replace to make one text the other.
size_t EditDistance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

std::string Where(const YAML::Mark& mark) {
  return mark.is_null() ? std::string() : "line " + std::to_string(mark.line + 1) + ": ";
}

CLI::ConfigError Refused(const std::string& why) { return {why, CLI::ExitCodes::ConfigError}; }

std::vector<std::string> Values(const std::string& key, const YAML::Node& node) {
  if (node.IsScalar()) return {node.Scalar()};
  const std::string where = Where(node.Mark());
  if (!node.IsSequence()) throw Refused(where + key + " must be a value or a list of values");
  std::vector<std::string> values;
  for (const YAML::Node& entry : node) {
    if (!entry.IsScalar()) throw Refused(where + key + " must be a list of plain values");
    values.push_back(entry.Scalar());
  }
  return values;
}

}  // namespace

std::string ClosestName(const std::string& name, const std::vector<std::string>& known) {
  std::string closest;
  size_t least = std::max<size_t>(2, name.size() / 3) + 1;
  for (const std::string& candidate : known) {
    const size_t distance = EditDistance(name, candidate);
    if (distance < least) {
      least = distance;
      closest = candidate;
    }
  }
  return closest;
}

std::string YamlConfig::to_config(const CLI::App* app, bool /*default_also*/,
                                  bool /*write_description*/, std::string /*prefix*/) const {
  std::ostringstream out;
  for (const CLI::Option* option : app->get_options()) {
    if (option->count() == 0 || option->get_lnames().empty()) continue;
    out << option->get_lnames().front() << ": [";
    const std::vector<std::string>& values = option->results();
    for (size_t i = 0; i < values.size(); ++i) out << (i == 0 ? "\"" : ", \"") << values[i] << '"';
    out << "]\n";
  }
  return out.str();
}

std::vector<CLI::ConfigItem> YamlConfig::from_config(std::istream& input) const {
  YAML::Node root;
  try {
    root = YAML::Load(input);
  } catch (const YAML::Exception& error) {
    throw Refused(Where(error.mark) + "not YAML: " + error.msg);
  }
  std::vector<CLI::ConfigItem> found;
  if (root.IsNull()) return found;
  if (!root.IsMap()) throw Refused("the file must be a mapping from options to values");
  std::set<std::string> seen;
  for (const auto& entry : root) {
    const std::string key = entry.first.IsScalar() ? entry.first.Scalar() : std::string("?");
    const std::string where = Where(entry.first.Mark());
    if (std::find(known_.begin(), known_.end(), key) == known_.end()) {
      const std::string closest = ClosestName(key, known_);
      const std::string hint = closest.empty() ? "" : "; did you mean '" + closest + "'?";
      throw Refused(where + "unknown key '" + key + "'" + hint);
    }
    if (!seen.insert(key).second) throw Refused(where + "key '" + key + "' is there twice");
    CLI::ConfigItem item;
    item.name = key;
    item.inputs = Values(key, entry.second);
    if (overridden_.contains(key)) continue;
    where_[key] = where;
    found.push_back(std::move(item));
  }
  return found;
}

std::string YamlConfig::WhereIs(const std::string& name) const {
  const auto found = where_.find(name);
  return found == where_.end() ? std::string() : found->second;
}

}  // namespace structkv
