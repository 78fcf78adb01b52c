#include "service/method/pyramid_budget.h"

#include <algorithm>
#include <cmath>

#include "service/method/budget.h"

namespace structkv::method {
namespace {

// A budget that falls linearly with depth.
struct Pyramid {
  double top = 0;     // of layer 0
  double bottom = 0;  // of the last layer
  int64_t layers = 1;

  double At(int64_t layer) const {
    const double steps =
        layers > 1 ? (top - bottom) / static_cast<double>(layers - 1) : top - bottom;
    return top - static_cast<double>(layer) * steps;
  }
};

// `mean` tokens a layer, none above `most`.
Pyramid MakePyramid(double mean, double most, double beta, int64_t layers) {
  Pyramid pyramid{.bottom = mean / beta, .layers = layers};
  pyramid.top = mean * 2 - pyramid.bottom;
  if (pyramid.top >= most) {
    pyramid.top = most;
    pyramid.bottom = mean * 2 - most;
  }
  return pyramid;
}

// As kvpress counts: the pyramid holds the window as well, and each layer is rounded for itself.
int64_t KvpressTokens(const MethodSpec& spec, int64_t tokens, int64_t layer, int64_t layers) {
  const auto n = static_cast<double>(tokens);
  const int64_t rows = WindowRows(spec, tokens);
  const auto window = static_cast<double>(rows);
  // Through the window and back, since that is where its rounding happens.
  const double mean = (window + n * spec.kv_budget.ratio) - window;
  const Pyramid pyramid = MakePyramid(mean, n - window, spec.beta, layers);
  const bool steep_enough =
      n >= pyramid.top && pyramid.top >= pyramid.bottom && pyramid.bottom >= window;
  const double share = steep_enough ? pyramid.At(layer) : n * spec.kv_budget.ratio;
  return std::clamp(static_cast<int64_t>(std::nearbyint(share)), rows, tokens);
}

}  // namespace

int64_t PyramidTokens(const MethodSpec& spec, int64_t tokens, int64_t layer, int64_t layers) {
  if (spec.kv_budget.kind == BudgetKind::kKvpress) {
    return KvpressTokens(spec, tokens, layer, layers);
  }
  const int64_t window = WindowRows(spec, tokens);
  const int64_t mean = KeptTokens(spec, tokens) - window;
  if (layers == 1) return window + mean;
  const Pyramid pyramid = MakePyramid(static_cast<double>(mean),
                                      static_cast<double>(tokens - window), spec.beta, layers);
  // Rounded down, but a whole number is not taken for a little less than it is; what is left goes
  // to the first layers that are not full, one token each.
  constexpr double kSlack = 1e-6;
  const auto whole = [&](int64_t l) {
    return static_cast<int64_t>(std::floor(pyramid.At(l) + kSlack));
  };
  int64_t left = mean * layers;
  int64_t full = 0;
  for (int64_t l = 0; l < layers; ++l) {
    left -= whole(l);
    if (whole(l) >= tokens - window) ++full;
  }
  return window + whole(layer) + (layer >= full && layer < full + left ? 1 : 0);
}

}  // namespace structkv::method
