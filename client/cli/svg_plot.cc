#include "client/cli/svg_plot.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cli/kept.h"
#include "client/cli/svg.h"
#include "client/cli/svg_style.h"
#include "client/cli/text.h"
#include "client/cli/token_strips.h"

namespace structkv::cli {
namespace {

// Everything in pixels of the document's own space.
constexpr double kWidth = 980;
constexpr double kLeft = 56;
constexpr double kRight = 24;
constexpr double kPanelTop = 112;
constexpr double kPanelHeight = 130;
constexpr double kPanelGap = 52;
constexpr double kMapTopWithPanels = 336;
constexpr double kMapTopAlone = 112;
constexpr double kSkeletonHeight = 16;

struct Metric {
  const char* name;
  const char* unit;
  const std::vector<float>* values;
};

// One metric over the layers.
class Panel {
 public:
  Panel(const PlotData& data, double left, double width)
      : data_(data), left_(left), width_(width), layers_(data.positions.size()) {}

  std::string Render(const Metric& metric, bool is_transition) {
    SetRange(*metric.values, is_transition);
    std::string out = "<g>\n";
    out += SvgText(left_, kPanelTop - 22, "head", metric.name);
    out += SvgText(left_, kPanelTop - 7, "note", metric.unit);
    if (is_transition && data_.search.has_value()) {
      const double begin = X(data_.search->first) - 4;
      const double end = X(data_.search->second) + 4;
      out += SvgRect(begin, kPanelTop, end - begin, kPanelHeight, "search");
    }
    const std::vector<double> ticks = Ticks(low_, high_, 3);
    // A lone tick says itself how many digits it needs.
    const double step = ticks.size() > 1             ? ticks[1] - ticks[0]
                        : ticks.empty() || !ticks[0] ? 1
                                                     : std::abs(ticks[0]);
    for (double tick : ticks) {
      out += SvgLine(left_, Y(tick), left_ + width_, Y(tick), "grid");
      out += SvgText(left_ - 6, Y(tick) + 4, "tick", TickText(tick, step), "end");
    }
    out +=
        SvgLine(left_, kPanelTop + kPanelHeight, left_ + width_, kPanelTop + kPanelHeight, "axis");
    out += LayerTicks();
    if (data_.pivot_layer.has_value()) {
      const double x = X(*data_.pivot_layer);
      out += SvgLine(x, kPanelTop, x, kPanelTop + kPanelHeight, "pivot-line");
    }
    out += Line(*metric.values);
    return out + "</g>\n";
  }

 private:
  void SetRange(const std::vector<float>& values, bool with_zero) {
    low_ = with_zero ? 0 : INFINITY;
    high_ = with_zero ? 0 : -INFINITY;
    for (float value : values) {
      if (!std::isfinite(value)) continue;
      low_ = std::min(low_, static_cast<double>(value));
      high_ = std::max(high_, static_cast<double>(value));
    }
    if (!(low_ <= high_)) low_ = high_ = 0;
    const double margin = high_ > low_ ? 0.06 * (high_ - low_) : std::max(0.5, 0.1 * high_);
    low_ -= margin;
    high_ += margin;
  }

  double X(size_t layer) const {
    const double steps = std::max<double>(1, static_cast<double>(layers_) - 1);
    return left_ + 6 + (width_ - 12) * static_cast<double>(layer) / steps;
  }
  double Y(double value) const {
    return kPanelTop + kPanelHeight * (high_ - value) / (high_ - low_);
  }

  std::string LayerTicks() const {
    std::string out;
    for (double tick : Ticks(0, static_cast<double>(layers_) - 1, 5)) {
      if (tick != std::floor(tick)) continue;
      out += SvgText(X(static_cast<size_t>(tick)), kPanelTop + kPanelHeight + 15, "tick",
                     TickText(tick, 1), "middle");
    }
    return out +
           SvgText(left_ + width_ / 2, kPanelTop + kPanelHeight + 31, "note", "layer", "middle");
  }

  std::string Line(const std::vector<float>& values) const {
    std::string path;
    std::string dots;
    bool pen_down = false;
    for (size_t layer = 0; layer < values.size(); ++layer) {
      if (!std::isfinite(values[layer])) {
        pen_down = false;
        continue;
      }
      const std::string x = Coordinate(X(layer));
      const std::string y = Coordinate(Y(values[layer]));
      absl::StrAppend(&path, pen_down ? "L" : "M", x, " ", y);
      pen_down = true;
      const bool is_pivot = data_.pivot_layer.has_value() && *data_.pivot_layer == layer;
      if (is_pivot || layers_ <= 40) {
        absl::StrAppend(&dots, "<circle cx=\"", x, "\" cy=\"", y, "\" r=\"",
                        is_pivot ? "4.5" : "2.5", "\" class=\"", is_pivot ? "pivot-dot" : "dot",
                        "\"><title>layer ", layer, ": ", values[layer], "</title></circle>\n");
      }
    }
    return absl::StrCat("<path class=\"line\" d=\"", path, "\"/>\n", dots);
  }

  const PlotData& data_;
  const double left_;
  const double width_;
  const size_t layers_;
  double low_ = 0;
  double high_ = 1;
};

// Which tokens each layer kept: one row a layer, shaded by the share of a bin's tokens.
class TokenMap {
 public:
  TokenMap(const PlotData& data, double top)
      : data_(data),
        top_(top),
        strips_(kLeft, kWidth - kLeft - kRight, data.prompt_tokens),
        pitch_(std::clamp(288.0 / static_cast<double>(data.positions.size()), 4.0, 24.0)) {}

  double height() const {
    const double rows = pitch_ * static_cast<double>(data_.positions.size());
    return rows + (data_.skeleton.empty() ? 0 : kSkeletonHeight + 10) + 56;
  }

  std::string Render() const {
    const size_t layers = data_.positions.size();
    const double gap = pitch_ >= 8 ? 2 : 1;
    std::string out = "<g>\n";
    out += SvgText(kLeft, top_ - 24, "head", "Tokens kept in each layer");
    out += Legend(top_ - 28);
    const size_t every = std::max<size_t>(1, static_cast<size_t>(std::ceil(14 / pitch_)));
    for (size_t layer = 0; layer < layers; ++layer) {
      const double y = top_ + pitch_ * static_cast<double>(layer);
      const bool is_pivot = data_.pivot_layer.has_value() && *data_.pivot_layer == layer;
      out += strips_.Strip(strips_.Shares(data_.positions[layer], data_.heads), y, pitch_ - gap,
                           "kept-run");
      // A label next to the pivot's own would collide with it.
      const size_t pivot = data_.pivot_layer.value_or(0);
      const size_t distance = layer > pivot ? layer - pivot : pivot - layer;
      const bool crowded = data_.pivot_layer.has_value() && distance < every;
      if (is_pivot) {
        out +=
            SvgText(kLeft - 8, y + pitch_ / 2 + 3, "pivot-text", absl::StrCat("L* ", layer), "end");
        out += Marker(y, pitch_ - gap);
      } else if (layer % every == 0 && !crowded) {
        out += SvgText(kLeft - 8, y + pitch_ / 2 + 3, "tick", absl::StrCat(layer), "end");
      }
    }
    double y = top_ + pitch_ * static_cast<double>(layers);
    if (!data_.skeleton.empty()) {
      y += 8;
      out += strips_.Strip(strips_.Shares(data_.skeleton, 1), y, kSkeletonHeight, "skeleton-run");
      out += SvgText(kLeft - 8, y + kSkeletonHeight / 2 + 4, "pivot-text", "skel.", "end");
      y += kSkeletonHeight + 2;
    }
    return out + strips_.Axis(y + 2) + "</g>\n";
  }

 private:
  // Triangles at both ends of the pivot's row.
  static std::string Marker(double y, double height) {
    const std::string middle = Coordinate(y + height / 2);
    const double x = kWidth - kRight + 4;
    return absl::StrCat("<path class=\"skeleton\" d=\"M", Coordinate(x), " ", middle,
                        "l8 -5v10z\"/>\n");
  }

  std::string Legend(double y) const {
    double x = kWidth - kRight;
    std::string out;
    const auto entry = [&](const char* text, double text_width, const std::string& key,
                           double key_width) {
      x -= text_width;
      out += SvgText(x, y + 4, "note", text);
      x -= key_width + 6;
      absl::StrAppend(&out, "<g transform=\"translate(", Coordinate(x), " ", Coordinate(y - 5),
                      ")\">", key, "</g>\n");
      x -= 18;
    };
    if (!data_.skeleton.empty()) {
      entry("in the skeleton", 86, SvgRect(0, 0, 10, 10, "skeleton"), 10);
    }
    if (!strips_.one_bin_a_token() || data_.heads > 1) {
      entry("few to all kept", 84, TokenStrips::Ramp(), TokenStrips::RampWidth());
    } else {
      entry("kept", 28, SvgRect(0, 0, 10, 10, "kept"), 10);
    }
    return out;
  }

  const PlotData& data_;
  const double top_;
  const TokenStrips strips_;
  const double pitch_;
};

// GemFilter looks at one layer; what it chooses there is for all.
bool ForAllLayers(const PlotData& data) {
  return data.method == "gemfilter" && data.pivot_layer.has_value();
}

std::string Title(const PlotData& data) {
  return absl::StrCat(
      data.method.empty() ? "Compacted cache" : data.method,
      data.model.empty() ? "" : absl::StrCat(" on ", data.model), ": ",
      KeptText(data.least_kept_tokens, data.kept_tokens), " of ", CountText(data.prompt_tokens),
      ForAllLayers(data)
          ? " tokens to prefill again with"
          : absl::StrCat(" tokens kept in each of ", data.positions.size(), " layers"));
}

std::string Subtitle(const PlotData& data) {
  if (ForAllLayers(data)) {
    return absl::StrCat("Chosen at layer ", *data.pivot_layer, " for all layers");
  }
  if (!data.pivot_layer.has_value()) {
    return data.heads > 1 ? absl::StrCat("Each of ", data.heads, " KV heads keeps its own tokens")
                          : "";
  }
  std::string text = absl::StrCat("Pivot L* at layer ", *data.pivot_layer);
  if (data.pivot_mode == "online" && data.decided_at_layer.has_value()) {
    absl::StrAppend(&text, ", decided online at layer ", *data.decided_at_layer);
  } else if (!data.transition_layer.has_value()) {
    text += data.pivot_mode == "profiled" ? ", from the model's profile" : ", as given";
  }
  if (data.transition_layer.has_value()) {
    absl::StrAppend(&text, "; highest transition score at layer ", *data.transition_layer,
                    " (search range shaded)");
  }
  if (!data.skeleton.empty()) {
    absl::StrAppend(&text, "; skeleton of ", CountText(data.skeleton.size()), " tokens");
  }
  return text;
}

}  // namespace

std::string RenderPlot(const PlotData& data) {
  std::vector<Metric> metrics;
  for (const Metric& metric :
       {Metric{"Entropy", "nats", &data.entropy},
        Metric{"Sparsity", "mass of the top tokens", &data.sparsity},
        Metric{"Variance", "relative to the mean", &data.variance},
        Metric{"Transition score", "weighted gradients", &data.transition}}) {
    if (!metric.values->empty()) metrics.push_back(metric);
  }
  const TokenMap map(data, metrics.empty() ? kMapTopAlone : kMapTopWithPanels);
  const double height = (metrics.empty() ? kMapTopAlone : kMapTopWithPanels) + map.height();
  const std::string title = Title(data);
  std::string out = absl::StrCat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ", Coordinate(kWidth), " ",
      Coordinate(height), "\" width=\"", Coordinate(kWidth), "\" height=\"", Coordinate(height),
      "\" role=\"img\">\n<title>", EscapeXml(title), "</title>\n", SvgStyle());
  out += SvgRect(0, 0, kWidth, height, "ground");
  out += SvgText(kLeft, 38, "title", title);
  out += SvgText(kLeft, 60, "subtitle", Subtitle(data));
  const auto count = static_cast<double>(metrics.size());
  const double width = (kWidth - kLeft - kRight - kPanelGap * (count - 1)) / std::max(count, 1.0);
  for (size_t i = 0; i < metrics.size(); ++i) {
    Panel panel(data, kLeft + static_cast<double>(i) * (width + kPanelGap), width);
    out += panel.Render(metrics[i], metrics[i].values == &data.transition);
  }
  return absl::StrCat(out, map.Render(), "</svg>\n");
}

}  // namespace structkv::cli
