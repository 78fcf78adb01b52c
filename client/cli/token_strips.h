// Strips that show which of a prompt's tokens were kept, in a picture.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace structkv::cli {

// Strips of one width, one below the other, over one axis of token positions. Long prompts are
// drawn in bins, shaded by the share of their tokens that was kept.
class TokenStrips {
 public:
  // In pixels of the document.
  TokenStrips(double left, double width, uint32_t prompt_tokens);

  // Whether every token has a bin of its own.
  bool one_bin_a_token() const { return bins_ == static_cast<int>(prompt_tokens_); }

  // The share of each bin's tokens that `positions` holds, where these are `sets` sets of
  // positions one after the other.
  std::vector<double> Shares(const std::vector<int32_t>& positions, size_t sets) const;

  // A strip with its ground. `css_class` is of a stroke: "kept-run", "skeleton-run".
  std::string Strip(const std::vector<double>& shares, double y, double height,
                    const char* css_class) const;

  // The axis below the strips.
  std::string Axis(double y) const;

  // The key of the shades, 10 pixels high, from few to all kept.
  static std::string Ramp();
  static double RampWidth();

 private:
  double X(double token) const { return left_ + width_ * token / prompt_tokens_; }

  const double left_;
  const double width_;
  const uint32_t prompt_tokens_;
  const int bins_;
};

}  // namespace structkv::cli
