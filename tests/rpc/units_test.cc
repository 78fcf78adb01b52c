#include "service/units.h"

#include <cstdint>
#include <limits>
#include <optional>
#include <ostream>
#include <string>

#include "gtest/gtest.h"

namespace structkv {
namespace {

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

struct Unit {
  std::string text;
  std::optional<int64_t> value;
};

void PrintTo(const Unit& unit, std::ostream* out) { *out << "'" << unit.text << "'"; }

class BytesTest : public ::testing::TestWithParam<Unit> {};
TEST_P(BytesTest, Parse) { EXPECT_EQ(ParseBytes(GetParam().text), GetParam().value); }

INSTANTIATE_TEST_SUITE_P(
    Good, BytesTest,
    ::testing::Values(Unit{"0", 0}, Unit{"4194304", 4194304}, Unit{"7B", 7}, Unit{"2kB", 2000},
                      Unit{"3MB", 3'000'000}, Unit{"4GB", 4'000'000'000},
                      Unit{"5TB", 5'000'000'000'000}, Unit{"6KiB", 6 << 10},
                      Unit{"512MiB", 512 << 20}, Unit{"8GiB", int64_t{8} << 30},
                      Unit{"9TiB", int64_t{9} << 40}, Unit{"1.5GB", 1'500'000'000},
                      Unit{"0.5KiB", 512}, Unit{"8 GiB", int64_t{8} << 30}, Unit{" 5 ", 5},
                      Unit{"9223372036854775807", kMax},
                      Unit{"8388607TiB", int64_t{8388607} << 40}));

INSTANTIATE_TEST_SUITE_P(
    Bad, BytesTest,
    ::testing::Values(Unit{"", {}}, Unit{"B", {}}, Unit{"GiB", {}}, Unit{"-1", {}},
                      Unit{"-1.5GiB", {}}, Unit{"x", {}}, Unit{"8 giraffes", {}}, Unit{"8GiB8", {}},
                      Unit{"8GIB", {}}, Unit{"1e400", {}}, Unit{"nan", {}}, Unit{"inf", {}},
                      Unit{"infB", {}}, Unit{"9223372036854775808", {}}, Unit{"8388608TiB", {}},
                      Unit{"9007199254740992KiB", {}}, Unit{"99999999999999999999999GiB", {}},
                      Unit{"1.5.5", {}}));

TEST(FormatBytesTest, UsesTheLargestUnitThatDivides) {
  EXPECT_EQ(FormatBytes(0), "0B");
  EXPECT_EQ(FormatBytes(1023), "1023B");
  EXPECT_EQ(FormatBytes(1024), "1KiB");
  EXPECT_EQ(FormatBytes(1025), "1025B");
  EXPECT_EQ(FormatBytes(512 << 20), "512MiB");
  EXPECT_EQ(FormatBytes(int64_t{8} << 30), "8GiB");
  EXPECT_EQ(FormatBytes(int64_t{64} << 40), "64TiB");
  EXPECT_EQ(FormatBytes(1'000'000), "1000000B");
  for (int64_t bytes : {int64_t{0}, int64_t{5}, int64_t{3} << 20, kMax, int64_t{1} << 62}) {
    EXPECT_EQ(ParseBytes(FormatBytes(bytes)), bytes);
  }
}

class MillisTest : public ::testing::TestWithParam<Unit> {};
TEST_P(MillisTest, Parse) { EXPECT_EQ(ParseMillis(GetParam().text), GetParam().value); }

INSTANTIATE_TEST_SUITE_P(Good, MillisTest,
                         ::testing::Values(Unit{"0", 0}, Unit{"500ms", 500}, Unit{"30s", 30'000},
                                           Unit{"1m30s", 90'000}, Unit{"2h", 7'200'000},
                                           Unit{"1.5s", 1500},
                                           Unit{"87600h", int64_t{87600} * 3'600'000}));

INSTANTIATE_TEST_SUITE_P(Bad, MillisTest,
                         ::testing::Values(Unit{"", {}}, Unit{"30", {}}, Unit{"-1s", {}},
                                           Unit{"s", {}}, Unit{"30 s", {}}, Unit{"2d", {}},
                                           Unit{"inf", {}}, Unit{"87601h", {}},
                                           Unit{"99999999999999999999h", {}}, Unit{"1s2", {}}));

TEST(FormatMillisTest, IsWhatParseMillisReads) {
  EXPECT_EQ(FormatMillis(0), "0");
  EXPECT_EQ(FormatMillis(500), "500ms");
  EXPECT_EQ(FormatMillis(30'000), "30s");
  for (int64_t millis : {int64_t{0}, int64_t{1}, int64_t{90'000}, int64_t{86'400'001}}) {
    EXPECT_EQ(ParseMillis(FormatMillis(millis)), millis);
  }
}

}  // namespace
}  // namespace structkv
