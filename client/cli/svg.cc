#include "client/cli/svg.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/text.h"

namespace structkv::cli {

std::string Coordinate(double value) {
  std::string text = absl::StrFormat("%.2f", value);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text == "-0" ? "0" : text;
}

std::string EscapeXml(std::string_view text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        if (static_cast<unsigned char>(c) >= 0x20) out.push_back(c);
    }
  }
  return out;
}

std::string SvgText(double x, double y, std::string_view css_class, std::string_view text,
                    std::string_view anchor) {
  std::string out = absl::StrCat("<text x=\"", Coordinate(x), "\" y=\"", Coordinate(y),
                                 "\" class=\"", std::string(css_class), "\"");
  if (anchor != "start") absl::StrAppend(&out, " text-anchor=\"", std::string(anchor), "\"");
  return absl::StrCat(out, ">", EscapeXml(text), "</text>\n");
}

std::string SvgLine(double x1, double y1, double x2, double y2, std::string_view css_class) {
  return absl::StrCat("<line x1=\"", Coordinate(x1), "\" y1=\"", Coordinate(y1), "\" x2=\"",
                      Coordinate(x2), "\" y2=\"", Coordinate(y2), "\" class=\"",
                      std::string(css_class), "\"/>\n");
}

std::string SvgRect(double x, double y, double width, double height, std::string_view css_class) {
  return absl::StrCat("<rect x=\"", Coordinate(x), "\" y=\"", Coordinate(y), "\" width=\"",
                      Coordinate(width), "\" height=\"", Coordinate(height), "\" class=\"",
                      std::string(css_class), "\"/>\n");
}

std::vector<double> Ticks(double low, double high, int count) {
  if (!(high > low)) return {low};
  const double rough = (high - low) / std::max(count, 1);
  const double magnitude = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * magnitude;
  for (double multiple : {1.0, 2.0, 2.5, 5.0}) {
    if (rough <= multiple * magnitude) {
      step = multiple * magnitude;
      break;
    }
  }
  std::vector<double> ticks;
  const auto first = static_cast<int64_t>(std::ceil(low / step - 1e-9));
  const auto last = static_cast<int64_t>(std::floor(high / step + 1e-9));
  for (int64_t i = first; i <= last; ++i) ticks.push_back(static_cast<double>(i) * step);
  return ticks;
}

std::string TickText(double value, double step) {
  if (step >= 1 && value >= 0 && step == std::floor(step)) {
    return CountText(static_cast<uint64_t>(std::llround(value)));
  }
  int decimals = 0;
  for (double s = step; decimals < 6 && std::abs(s - std::round(s)) > 1e-6; s *= 10) ++decimals;
  return absl::StrFormat("%.*f", decimals, value);
}

}  // namespace structkv::cli
