#include "service/trace/trace_context.h"

#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace structkv::trace {
namespace {

const std::string kTrace = "4bf92f3577b34da6a3ce929d0e0e4736";
const std::string kSpan = "00f067aa0ba902b7";
const std::string kGood = "00-" + kTrace + "-" + kSpan + "-01";

TEST(TraceParentTest, TakesTheSpecificationsExample) {
  const auto parent = ParseTraceParent(kGood);
  ASSERT_TRUE(parent.has_value());
  EXPECT_EQ(Hex(parent->trace), kTrace);
  EXPECT_EQ(Hex(parent->span), kSpan);
  EXPECT_TRUE(parent->sampled);
}

TEST(TraceParentTest, SampledIsTheLowestFlag) {
  const std::string head = kGood.substr(0, 53);
  for (const auto& [flags, sampled] : std::vector<std::pair<std::string, bool>>{
           {"00", false}, {"01", true}, {"02", false}, {"03", true}, {"ff", true}, {"fe", false}}) {
    const auto parent = ParseTraceParent(head + flags);
    ASSERT_TRUE(parent.has_value()) << flags;
    EXPECT_EQ(parent->sampled, sampled) << flags;
  }
}

TEST(TraceParentTest, VersionsToComeMayBeLonger) {
  const std::string tail = kGood.substr(2);
  EXPECT_TRUE(ParseTraceParent("cc" + tail).has_value());
  EXPECT_TRUE(ParseTraceParent("cc" + tail + "-what-the-future-holds").has_value());
  EXPECT_TRUE(ParseTraceParent("cc" + tail + "-").has_value());
  EXPECT_FALSE(ParseTraceParent("cc" + tail + ".later").has_value());
  EXPECT_FALSE(ParseTraceParent("cc" + tail + "1").has_value());
  EXPECT_FALSE(ParseTraceParent("ff" + tail).has_value());
}

TEST(TraceParentTest, RefusesAllElse) {
  const std::vector<std::string> bad = {
      "",
      "00",
      kGood.substr(0, 54),
      kGood + "1",
      kGood + "-",
      kGood + " ",
      " " + kGood,
      kGood.substr(1) + "0",
      "0x" + kGood.substr(2),
      "00-" + std::string(32, '0') + "-" + kSpan + "-01",
      "00-" + kTrace + "-" + std::string(16, '0') + "-01",
      "00-" + kTrace + "-" + kSpan + "-0g",
      "00-4BF92F3577B34DA6A3CE929D0E0E4736-" + kSpan + "-01",
      "00-" + kTrace + "-00F067AA0BA902B7-01",
      "00_" + kTrace + "-" + kSpan + "-01",
      "00-" + kTrace + "_" + kSpan + "-01",
      "00-" + kTrace + "-" + kSpan + "_01",
      "00-" + kTrace.substr(1) + "-" + kSpan + "-001",
      kGood + "," + kGood,
  };
  for (const std::string& text : bad) EXPECT_FALSE(ParseTraceParent(text).has_value()) << text;
}

TEST(TraceStateTest, JoinsWhatCame) {
  EXPECT_EQ(JoinTraceState({}), "");
  EXPECT_EQ(JoinTraceState({"rojo=00f067aa0ba902b7"}), "rojo=00f067aa0ba902b7");
  EXPECT_EQ(JoinTraceState({"a=1,b=2", "c=3"}), "a=1,b=2,c=3");
  EXPECT_EQ(JoinTraceState({" a=1 ,\tb=2 , ,"}), "a=1,b=2");
  EXPECT_EQ(JoinTraceState({"0tenant@sys=x y", "a_-*/9=!~"}), "0tenant@sys=x y,a_-*/9=!~");
}

TEST(TraceStateTest, RefusesAllElse) {
  for (const std::string text : {"a", "=1", "a=", "A=1", "1a=1", "a b=1", "a@=1", "@a=1", "a@1b=1",
                                 "a@b@c=1", "a=1,a=2", "a=b=c", "a=\x7f", "a=\t1", "a=1,b"}) {
    EXPECT_EQ(JoinTraceState({text}), "") << text;
  }
  EXPECT_EQ(JoinTraceState({"a=1", "a=2"}), "");
  EXPECT_EQ(JoinTraceState({"a=" + std::string(257, 'x')}), "");
  EXPECT_NE(JoinTraceState({"a=" + std::string(256, 'x')}), "");
  EXPECT_EQ(JoinTraceState({std::string(257, 'a') + "=1"}), "");
  EXPECT_NE(JoinTraceState({std::string(256, 'a') + "=1"}), "");
  EXPECT_EQ(JoinTraceState({std::string(242, 'a') + "@s=1"}), "");
  EXPECT_EQ(JoinTraceState({"a@" + std::string(15, 's') + "=1"}), "");
}

TEST(TraceStateTest, AtMostSoManyMembers) {
  std::string text;
  for (size_t i = 0; i < kMaxStateMembers; ++i) text += "k" + std::to_string(i) + "=v,";
  EXPECT_NE(JoinTraceState({text}), "");
  EXPECT_EQ(JoinTraceState({text + "more=v"}), "");
}

TEST(IdsTest, AreNewEachTime) {
  std::set<std::string> seen;
  for (int i = 0; i < 1000; ++i) {
    EXPECT_TRUE(seen.insert(Hex(NewTraceId())).second);
    EXPECT_TRUE(seen.insert(Hex(NewSpanId())).second);
  }
  EXPECT_EQ(seen.begin()->size() % 16, 0U);
}

TEST(SamplingTest, ShareOfTheIds) {
  TraceId low = {};
  low[15] = 1;
  TraceId high = {};
  high.fill(0xff);
  EXPECT_FALSE(SamplesRoot(low, 0));
  EXPECT_TRUE(SamplesRoot(low, 0.001));
  EXPECT_FALSE(SamplesRoot(high, 0.999));
  EXPECT_TRUE(SamplesRoot(high, 1));
  int sampled = 0;
  for (int i = 0; i < 256; ++i) {  // the ids' first random byte decides
    TraceId id = {};
    id[9] = static_cast<uint8_t>(i);
    if (SamplesRoot(id, 0.25)) ++sampled;
  }
  EXPECT_EQ(sampled, 64);
}

}  // namespace
}  // namespace structkv::trace
