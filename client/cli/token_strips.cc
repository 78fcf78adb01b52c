#include "client/cli/token_strips.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "absl/strings/str_cat.h"
#include "client/cli/svg.h"

namespace structkv::cli {
namespace {

constexpr uint32_t kMaxBins = 1000;
constexpr int kShades = 5;
constexpr double kKeyWidth = 10;

int Shade(double share) {
  return share <= 0 ? 0 : std::clamp(static_cast<int>(std::ceil(share * kShades)), 1, kShades);
}
double Opacity(int shade) { return 0.25 + 0.75 * shade / kShades; }

// A path of runs on one line, each a move from the end of the one before.
struct Runs {
  std::string path;
  double end = 0;

  void Add(double x, double length) {
    // What is written is rounded: the next move starts from there.
    const double move = std::round((x - end) * 100) / 100;
    const double run = std::round(length * 100) / 100;
    absl::StrAppend(&path, "m", Coordinate(move), " 0h", Coordinate(run));
    end += move + run;
  }
};

}  // namespace

TokenStrips::TokenStrips(double left, double width, uint32_t prompt_tokens)
    : left_(left),
      width_(width),
      prompt_tokens_(prompt_tokens),
      bins_(static_cast<int>(std::min(prompt_tokens, kMaxBins))) {}

std::vector<double> TokenStrips::Shares(const std::vector<int32_t>& positions, size_t sets) const {
  std::vector<double> shares(static_cast<size_t>(bins_));
  const double tokens_per_bin = static_cast<double>(prompt_tokens_) / bins_;
  const double part = 1 / (tokens_per_bin * static_cast<double>(sets));
  for (const int32_t position : positions) {
    const auto bin = static_cast<size_t>(static_cast<double>(position) / tokens_per_bin);
    shares[std::min(bin, shares.size() - 1)] += part;
  }
  return shares;
}

std::string TokenStrips::Strip(const std::vector<double>& shares, double y, double height,
                               const char* css_class) const {
  std::map<int, Runs> shades;
  const double bin_width = width_ / bins_;
  // Sums of shares may lie a rounding above what a shade ends with.
  const auto shade_of = [&shares](size_t bin) { return Shade(shares[bin] - 1e-9); };
  for (size_t bin = 0; bin < shares.size();) {
    const int shade = shade_of(bin);
    size_t end = bin + 1;
    while (end < shares.size() && shade_of(end) == shade) ++end;
    if (shade > 0) {
      shades[shade].Add(bin_width * static_cast<double>(bin),
                        bin_width * static_cast<double>(end - bin));
    }
    bin = end;
  }
  std::string out = SvgRect(left_, y, width_, height, "track");
  for (const auto& [shade, runs] : shades) {
    absl::StrAppend(&out, "<path class=\"", css_class, "\" stroke-width=\"", Coordinate(height),
                    "\" stroke-opacity=\"", Coordinate(Opacity(shade)), "\" d=\"M",
                    Coordinate(left_), " ", Coordinate(y + height / 2), runs.path, "\"/>\n");
  }
  return out;
}

std::string TokenStrips::Axis(double y) const {
  std::string out = SvgLine(left_, y, left_ + width_, y, "axis");
  const std::vector<double> ticks = Ticks(0, prompt_tokens_, 10);
  const double step = ticks.size() > 1 ? ticks[1] - ticks[0] : 1;
  for (const double tick : ticks) {
    if (tick != std::floor(tick)) continue;
    out += SvgLine(X(tick), y, X(tick), y + 4, "axis");
    out += SvgText(X(tick), y + 17, "tick", TickText(tick, step), "middle");
  }
  return out +
         SvgText(left_ + width_ / 2, y + 34, "note", "token position in the prompt", "middle");
}

std::string TokenStrips::Ramp() {
  std::string ramp;
  for (int shade = 1; shade <= kShades; ++shade) {
    absl::StrAppend(&ramp, "<rect x=\"", Coordinate((shade - 1) * kKeyWidth), "\" y=\"0\" width=\"",
                    Coordinate(kKeyWidth), "\" height=\"10\" class=\"kept\" fill-opacity=\"",
                    Coordinate(Opacity(shade)), "\"/>");
  }
  return ramp;
}

double TokenStrips::RampWidth() { return kKeyWidth * kShades; }

}  // namespace structkv::cli
