#include "client/cli/rotary_flags.h"

#include "absl/strings/numbers.h"

namespace structkv::cli {
namespace {

constexpr char kGroup[] = "Positions (config.json's rope parameters)";

v1::RopeType ParseScaling(const std::string& text) {
  if (text == "linear") return v1::ROPE_TYPE_LINEAR;
  if (text == "dynamic") return v1::ROPE_TYPE_DYNAMIC;
  if (text == "yarn") return v1::ROPE_TYPE_YARN;
  return text == "llama3" ? v1::ROPE_TYPE_LLAMA3 : v1::ROPE_TYPE_DEFAULT;
}

}  // namespace

void AddRotaryFlags(CLI::App* app, RotaryFlags* f) {
  CLI::Option* rerotate =
      app->add_flag("--rerotate", f->rerotate,
                    "Turn kept keys to consecutive positions; a decoder then goes on at the "
                    "number of kept tokens")
          ->group(kGroup);
  const auto add = [&](const char* name, auto* value, const char* help) {
    return app->add_option(name, *value, help)->needs(rerotate)->group(kGroup);
  };
  add("--rope-theta", &f->theta, "Base of the frequencies (the capture's rope_theta)");
  add("--rope-scaling", &f->scaling, "default, linear, dynamic, yarn or llama3")
      ->check(CLI::IsMember({"default", "linear", "dynamic", "yarn", "llama3"}));
  add("--rope-factor", &f->factor, "factor, of all but default");
  add("--rope-original-max", &f->original_max, "yarn, llama3: original_max_position_embeddings");
  add("--rope-max", &f->max, "dynamic: max_position_embeddings");
  add("--rope-beta-fast", &f->beta_fast, "yarn: beta_fast (32)");
  add("--rope-beta-slow", &f->beta_slow, "yarn: beta_slow (1)");
  app->add_flag("--rope-no-truncate", f->no_truncate, "yarn: truncate is false")
      ->needs(rerotate)
      ->group(kGroup);
  add("--rope-low-freq", &f->low_freq_factor, "llama3: low_freq_factor");
  add("--rope-high-freq", &f->high_freq_factor, "llama3: high_freq_factor");
  add("--rope-pairing", &f->pairing, "half-split (default) or interleaved")
      ->check(CLI::IsMember({"half-split", "interleaved"}));
  add("--rotary-dim", &f->dim, "Elements of a key that rotate (all from --rotary-offset on)");
  add("--rotary-offset", &f->offset, "The first of them (0)");
}

void SetRotary(const RotaryFlags& flags, const std::map<std::string, std::string>& metadata,
               v1::Open* open) {
  if (!flags.rerotate) return;
  v1::RotaryParameters* rotary = open->mutable_rotary();
  const auto captured = metadata.find("rope_theta");
  double theta = 0;
  if (flags.theta.has_value()) {
    rotary->set_rope_theta(*flags.theta);
  } else if (captured != metadata.end() && absl::SimpleAtod(captured->second, &theta)) {
    rotary->set_rope_theta(theta);
  }
  if (flags.scaling) rotary->set_rope_type(ParseScaling(*flags.scaling));
  if (flags.factor) rotary->set_factor(*flags.factor);
  if (flags.original_max) rotary->set_original_max_position_embeddings(*flags.original_max);
  if (flags.max) rotary->set_max_position_embeddings(*flags.max);
  if (flags.beta_fast) rotary->set_beta_fast(*flags.beta_fast);
  if (flags.beta_slow) rotary->set_beta_slow(*flags.beta_slow);
  if (flags.no_truncate) rotary->set_truncate(false);
  if (flags.low_freq_factor) rotary->set_low_freq_factor(*flags.low_freq_factor);
  if (flags.high_freq_factor) rotary->set_high_freq_factor(*flags.high_freq_factor);
  if (flags.pairing) {
    rotary->set_pairing(*flags.pairing == "interleaved" ? v1::ROTARY_PAIRING_INTERLEAVED
                                                        : v1::ROTARY_PAIRING_HALF_SPLIT);
  }
  if (flags.dim) rotary->set_rotary_dim(*flags.dim);
  if (flags.offset) rotary->set_rotary_offset(*flags.offset);
}

}  // namespace structkv::cli
