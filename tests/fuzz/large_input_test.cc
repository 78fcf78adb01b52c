// Inputs that are too long for a corpus.
#include <string>
#include <utility>

#include "client/cli/safetensors.h"
#include "gtest/gtest.h"

namespace structkv {
namespace {

// A header of a few megabytes can be millions of levels deep; none may cost a level of the stack.
TEST(SafetensorsTest, RefusesADeepHeader) {
  for (const auto& [open, close] : {std::pair("[", "]"), std::pair("{\"a\":", "}")}) {
    std::string header = "{\"a\":{\"dtype\":";
    for (int i = 0; i < 1'000'000; ++i) header += open;
    header += "1";
    for (int i = 0; i < 1'000'000; ++i) header += close;
    header += ",\"shape\":[],\"data_offsets\":[0,0]}}";
    const absl::Status status = cli::ParseSafetensorsHeader(header, 0).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status));
    EXPECT_EQ(std::string(status.message()), "the header is nested deeper than 16 levels");
  }
}

}  // namespace
}  // namespace structkv
