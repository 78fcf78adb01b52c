// The series of /metrics as a program reads them.
#pragma once

#include <map>
#include <sstream>
#include <string>

namespace structkv::testkit {

// By name with labels, as in the text: `structkv_sessions_total{result="ok"}`.
inline std::map<std::string, double> SeriesOf(const std::string& text) {
  std::map<std::string, double> series;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t blank = line.rfind(' ');
    if (line.empty() || line[0] == '#' || blank == std::string::npos) continue;
    series[line.substr(0, blank)] = std::stod(line.substr(blank + 1));
  }
  return series;
}

// Those of one name, by their labels as in the text: `result="ok"`; of one without labels by "".
inline std::map<std::string, double> SeriesOf(const std::string& text, const std::string& name) {
  std::map<std::string, double> found;
  for (const auto& [key, value] : SeriesOf(text)) {
    if (key == name) found[""] = value;
    if (key.rfind(name + "{", 0) != 0) continue;
    found[key.substr(name.size() + 1, key.size() - name.size() - 2)] = value;
  }
  return found;
}

}  // namespace structkv::testkit
