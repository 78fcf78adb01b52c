#include "client/cli/svg_compare.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "client/cli/svg.h"
#include "client/cli/svg_style.h"
#include "client/cli/text.h"
#include "client/cli/token_strips.h"

namespace structkv::cli {
namespace {

// Everything in pixels of the document's own space.
constexpr double kWidth = 1080;
constexpr double kLeft = 28;
constexpr double kRight = 28;
constexpr double kBarsLeft = 138;   // of everything to the right of the methods' names
constexpr double kBytesWidth = 96;  // of a bar as long as can be
constexpr double kErrorLeft = 338;
constexpr double kErrorWidth = 132;
constexpr double kMatrixLeft = 640;
constexpr double kRowsTop = 170;
constexpr double kRow = 26;
constexpr double kMaxCell = 60;
constexpr double kStripHeight = 48;
constexpr double kStripGap = 12;
constexpr size_t kMaxBands = 24;

// One row a method: its bars, and its row of the matrix.
class Rows {
 public:
  explicit Rows(const ComparisonPicture& picture) : picture_(picture) {
    for (const ComparedMethod& method : picture.methods) {
      highest_ = std::max(highest_, method.worst_error.value_or(0));
    }
    if (highest_ == 0) highest_ = 1;
    const auto count = static_cast<double>(picture.methods.size());
    cell_ = std::min(kMaxCell, (kWidth - kRight - kMatrixLeft) / std::max(count, 1.0));
  }

  double bottom() const { return kRowsTop + kRow * static_cast<double>(picture_.methods.size()); }

  std::string Render() const {
    std::string out = "<g>\n";
    out += SvgText(kBarsLeft, kRowsTop - 60, "head", "KV cache kept");
    out += SvgText(kBarsLeft, kRowsTop - 45, "note",
                   absl::StrCat("of ", BytesText(picture_.full_bytes)));
    out += SvgText(kErrorLeft, kRowsTop - 60, "head", "Error of attention outputs");
    out += SvgText(
        kErrorLeft, kRowsTop - 45, "note",
        absl::StrCat("of the ", picture_.future_tokens, " tokens after the prompt; mean of the"));
    out += SvgText(kErrorLeft, kRowsTop - 31, "note", "layers, and the worst layer");
    out += SvgText(kMatrixLeft, kRowsTop - 90, "head", "Overlap");
    out += SvgText(kMatrixLeft + 62, kRowsTop - 90, "note",
                   "% of the row's tokens that the column's method keeps too");
    out += ErrorAxis() + ColumnNames();
    for (size_t i = 0; i < picture_.methods.size(); ++i) out += Row(i);
    return out + "</g>\n";
  }

 private:
  double ErrorX(double error) const { return kErrorLeft + kErrorWidth * error / highest_; }

  std::string ErrorAxis() const {
    std::string out;
    const std::vector<double> ticks = Ticks(0, highest_ * 100, 2);
    const double step = ticks.size() > 1 ? ticks[1] - ticks[0] : 1;
    for (const double tick : ticks) {
      const double x = ErrorX(tick / 100);
      out += SvgLine(x, kRowsTop, x, bottom(), "grid");
      out += SvgText(x, kRowsTop - 6, "tick", absl::StrCat(TickText(tick, step), " %"), "middle");
    }
    return out;
  }

  std::string ColumnNames() const {
    std::string out;
    for (size_t i = 0; i < picture_.methods.size(); ++i) {
      absl::StrAppend(&out, "<text class=\"note\" transform=\"translate(",
                      Coordinate(kMatrixLeft + cell_ * (static_cast<double>(i) + 0.5) - 2), " ",
                      Coordinate(kRowsTop - 7), ") rotate(-38)\">",
                      EscapeXml(picture_.methods[i].name), "</text>\n");
    }
    return out;
  }

  std::string Row(size_t index) const {
    const ComparedMethod& method = picture_.methods[index];
    const double y = kRowsTop + kRow * static_cast<double>(index);
    const double text = y + kRow / 2 + 4;
    std::string out = SvgText(kLeft, text, "label", method.name);
    const double share =
        static_cast<double>(method.bytes) / static_cast<double>(picture_.full_bytes);
    out += SvgRect(kBarsLeft, y + 6, kBytesWidth, kRow - 12, "track");
    out += SvgRect(kBarsLeft, y + 6, kBytesWidth * share, kRow - 12, "kept");
    out += SvgText(kBarsLeft + kBytesWidth + 8, text, "note", BytesText(method.bytes));
    return out + Error(method, y, text) + Cells(index, y);
  }

  std::string Error(const ComparedMethod& method, double y, double text) const {
    if (!method.error.has_value()) {
      return SvgText(kErrorLeft, text, "note", "no cache to measure");
    }
    const double mean = ErrorX(*method.error);
    const double worst = ErrorX(method.worst_error.value_or(*method.error));
    const double middle = y + kRow / 2;
    std::string out = SvgRect(kErrorLeft, y + 6, mean - kErrorLeft, kRow - 12, "kept");
    out += SvgLine(mean, middle, worst, middle, "range");
    out += SvgLine(worst, middle - 5, worst, middle + 5, "range");
    out += SvgText(kErrorLeft + kErrorWidth + 12, text, "note",
                   absl::StrCat(PercentText(*method.error), ", worst ",
                                PercentText(method.worst_error.value_or(*method.error))));
    return out;
  }

  std::string Cells(size_t row, double y) const {
    std::string out;
    for (size_t column = 0; column < picture_.methods.size(); ++column) {
      const double share = Overlap(picture_.methods[row].sets, picture_.methods[column].sets);
      const double x = kMatrixLeft + cell_ * static_cast<double>(column);
      out += SvgRect(x, y, cell_ - 2, kRow - 2, "track");
      absl::StrAppend(&out, "<rect x=\"", Coordinate(x), "\" y=\"", Coordinate(y), "\" width=\"",
                      Coordinate(cell_ - 2), "\" height=\"", Coordinate(kRow - 2),
                      "\" class=\"kept\" fill-opacity=\"", Coordinate(share * share), "\"/>\n");
      out += SvgText(x + (cell_ - 2) / 2, y + kRow / 2 + 3,
                     share * share > 0.7 ? "cell-text-on" : "cell-text",
                     absl::StrCat(std::lround(share * 100)), "middle");
    }
    return out;
  }

  const ComparisonPicture& picture_;
  double highest_ = 0;  // error
  double cell_ = 0;
};

// One strip a method, its layers one below the other.
class Maps {
 public:
  Maps(const ComparisonPicture& picture, double top)
      : picture_(picture),
        top_(top),
        strips_(kBarsLeft, kWidth - kRight - kBarsLeft, picture.prompt_tokens) {}

  double bottom() const {
    return top_ + (kStripHeight + kStripGap) * static_cast<double>(picture_.methods.size()) + 44;
  }

  std::string Render() const {
    std::string out = "<g>\n";
    out += SvgText(kLeft, top_ - 26, "head", "Tokens kept");
    out += SvgText(kBarsLeft, top_ - 26, "note",
                   "the first layer at the top of each strip, the last one at its bottom");
    out += Legend();
    for (size_t i = 0; i < picture_.methods.size(); ++i) {
      const double y = top_ + (kStripHeight + kStripGap) * static_cast<double>(i);
      out += SvgText(kLeft, y + kStripHeight / 2 + 4, "label", picture_.methods[i].name);
      out += Method(picture_.methods[i], y);
    }
    return out + strips_.Axis(bottom() - 44 - kStripGap + 6) + "</g>\n";
  }

 private:
  std::string Legend() const {
    constexpr double kTextWidth = 84;
    constexpr double kPivotWidth = 64;
    double x = kWidth - kRight - kTextWidth;
    std::string out = SvgText(x, top_ - 26, "note", "few to all kept");
    x -= TokenStrips::RampWidth() + 6;
    absl::StrAppend(&out, "<g transform=\"translate(", Coordinate(x), " ", Coordinate(top_ - 35),
                    ")\">", TokenStrips::Ramp(), "</g>\n");
    const bool pivots =
        std::any_of(picture_.methods.begin(), picture_.methods.end(),
                    [](const ComparedMethod& method) { return method.pivot_layer.has_value(); });
    if (!pivots) return out;
    x -= kPivotWidth + 12;
    return out + Marker(x - 12, top_ - 30) + SvgText(x, top_ - 26, "note", "pivot layer");
  }

  static std::string Marker(double x, double y) {
    return absl::StrCat("<path class=\"skeleton\" d=\"M", Coordinate(x), " ", Coordinate(y),
                        "l8 -4v8z\"/>\n");
  }

  // A band shows one layer, or the mean of several.
  std::string Method(const ComparedMethod& method, double y) const {
    const size_t layers = method.sets.size();
    const size_t bands = std::min(layers, kMaxBands);
    const double height = kStripHeight / static_cast<double>(bands);
    std::string out;
    for (size_t band = 0; band < bands; ++band) {
      std::vector<int32_t> positions;
      size_t sets = 0;
      for (size_t layer = band * layers / bands; layer < (band + 1) * layers / bands; ++layer) {
        for (const std::vector<int32_t>& head : method.sets[layer]) {
          positions.insert(positions.end(), head.begin(), head.end());
          ++sets;
        }
      }
      out += strips_.Strip(strips_.Shares(positions, std::max<size_t>(sets, 1)),
                           y + height * static_cast<double>(band), height, "kept-run");
    }
    if (method.pivot_layer.has_value() && layers > 0) {
      const double at = (*method.pivot_layer + 0.5) / static_cast<double>(layers);
      out += Marker(kWidth - kRight + 3, y + kStripHeight * at);
    }
    return out;
  }

  const ComparisonPicture& picture_;
  const double top_;
  const TokenStrips strips_;
};

}  // namespace

std::string RenderComparison(const ComparisonPicture& picture) {
  const Rows rows(picture);
  const Maps maps(picture, rows.bottom() + 66);
  const std::string title = absl::StrCat(
      picture.methods.size(), picture.methods.size() == 1 ? " method" : " methods",
      picture.model.empty() ? "" : absl::StrCat(" on ", picture.model), ": ",
      PercentText(picture.kv_budget), " of ", CountText(picture.prompt_tokens), " tokens kept");
  std::string out =
      absl::StrCat("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ", Coordinate(kWidth),
                   " ", Coordinate(maps.bottom()), "\" width=\"", Coordinate(kWidth),
                   "\" height=\"", Coordinate(maps.bottom()), "\" role=\"img\">\n<title>",
                   EscapeXml(title), "</title>\n", SvgStyle());
  out += SvgRect(0, 0, kWidth, maps.bottom(), "ground");
  out += SvgText(kLeft, 38, "title", title);
  out += SvgText(kLeft, 60, "subtitle",
                 "What each method keeps, what that costs, and how far the methods agree");
  return absl::StrCat(out, rows.Render(), maps.Render(), "</svg>\n");
}

}  // namespace structkv::cli
