// Pieces of SVG text.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace structkv::cli {

// A coordinate, with at most two decimals.
std::string Coordinate(double value);

// Text with the characters escaped that XML reserves; control characters are dropped.
std::string EscapeXml(std::string_view text);

// <text>; `anchor` is start, middle or end.
std::string SvgText(double x, double y, std::string_view css_class, std::string_view text,
                    std::string_view anchor = "start");
std::string SvgLine(double x1, double y1, double x2, double y2, std::string_view css_class);
std::string SvgRect(double x, double y, double width, double height, std::string_view css_class);

// Round numbers, about `count` of them, from `low` to `high`, both included where they are round.
std::vector<double> Ticks(double low, double high, int count);

// As few decimals as tell ticks of this step apart.
std::string TickText(double value, double step);

}  // namespace structkv::cli
