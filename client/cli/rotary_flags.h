// Turning kept keys to consecutive positions, as command-line flags.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "CLI/CLI.hpp"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// Unset: the service's default, or not given.
struct RotaryFlags {
  bool rerotate = false;
  std::optional<double> theta;
  std::optional<std::string> scaling;
  std::optional<double> factor;
  std::optional<uint32_t> original_max;
  std::optional<uint32_t> max;
  std::optional<double> beta_fast;
  std::optional<double> beta_slow;
  bool no_truncate = false;
  std::optional<double> low_freq_factor;
  std::optional<double> high_freq_factor;
  std::optional<std::string> pairing;
  std::optional<uint32_t> dim;
  std::optional<uint32_t> offset;
};

// All but --rerotate need --rerotate.
void AddRotaryFlags(CLI::App* app, RotaryFlags* flags);

// Sets `open.rotary` where --rerotate was given. Without --rope-theta it is `rope_theta` of
// `metadata`, a capture's, where that is a number; else it stays unset, which the service refuses.
void SetRotary(const RotaryFlags& flags, const std::map<std::string, std::string>& metadata,
               v1::Open* open);

}  // namespace structkv::cli
