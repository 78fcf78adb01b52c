// The pivot profile: what it learns and forgets, and its file through restarts, damage and threads.
#include "service/session/pivot_profile.h"

#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/session/pivot_profile_file.h"
#include "tests/testing/process.h"

namespace structkv::session {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

engine::PromptSpec Spec(const std::string& model = "llama", int64_t layers = 32) {
  engine::PromptSpec spec;
  spec.geometry.layers = layers;
  spec.model_id = model;
  spec.method.pivot.mode = method::PivotMode::kProfiled;
  spec.method.pivot.profile_min_prompts = 3;
  return spec;
}

std::optional<int64_t> Layer(PivotProfile& profile, engine::PromptSpec spec) {
  profile.Resolve(&spec);
  return spec.method.pivot.profiled_layer;
}

std::string Read(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

class PivotProfileTest : public ::testing::Test {
 protected:
  std::shared_ptr<PivotProfile> Open(PivotProfileOptions options) {
    options.warn = [this](const std::string& text) { warnings_.push_back(text); };
    auto profile = PivotProfile::Open(std::move(options));
    EXPECT_TRUE(profile.ok()) << profile.status();
    return profile.ok() ? *profile : nullptr;
  }
  std::shared_ptr<PivotProfile> OpenFile() { return Open({.file = file_}); }

  testkit::TemporaryDirectory directory_;
  const std::string file_ = directory_.Path("profile.json");
  std::vector<std::string> warnings_;
};

TEST_F(PivotProfileTest, GivesTheMostFrequentLayerOnceEnoughWereSeen) {
  auto profile = Open({});
  EXPECT_EQ(Layer(*profile, Spec()), std::nullopt);
  profile->Record(Spec(), 16);
  profile->Record(Spec(), 20);
  EXPECT_EQ(Layer(*profile, Spec()), std::nullopt) << "two of three";
  profile->Record(Spec(), 18);
  EXPECT_EQ(Layer(*profile, Spec()), 16) << "the lowest at a tie";
  profile->Record(Spec(), 20);
  engine::PromptSpec spec = Spec();
  profile->Resolve(&spec);
  EXPECT_EQ(spec.method.pivot.profiled_layer, 20);
  EXPECT_EQ(spec.method.pivot.profiled_prompts, 4);
}

TEST_F(PivotProfileTest, OtherModelsDepthsAndParametersAreOthers) {
  auto profile = Open({});
  for (int i = 0; i < 3; ++i) profile->Record(Spec(), 16);
  EXPECT_EQ(Layer(*profile, Spec("qwen")), std::nullopt);
  EXPECT_EQ(Layer(*profile, Spec("llama", 33)), std::nullopt);
  engine::PromptSpec weights = Spec();
  weights.method.pivot.entropy_weight = 1;
  EXPECT_EQ(Layer(*profile, weights), std::nullopt);
  engine::PromptSpec exact = Spec();
  exact.method.pivot.mode = method::PivotMode::kExact;
  EXPECT_EQ(Layer(*profile, exact), std::nullopt) << "only PROFILED asks";
  profile->Record(Spec(""), 16);
  EXPECT_EQ(profile->models(), 1) << "a prompt without a model is not counted";
}

TEST_F(PivotProfileTest, TheModelNotUsedForLongestIsForgotten) {
  auto profile = Open({.max_models = 2});
  for (int i = 0; i < 3; ++i) profile->Record(Spec("a"), 5);
  for (int i = 0; i < 3; ++i) profile->Record(Spec("b"), 6);
  EXPECT_EQ(Layer(*profile, Spec("a")), 5);  // used after b
  profile->Record(Spec("c"), 7);
  EXPECT_EQ(profile->models(), 2);
  EXPECT_EQ(Layer(*profile, Spec("a")), 5);
  EXPECT_EQ(Layer(*profile, Spec("b")), std::nullopt);
}

TEST_F(PivotProfileTest, SurvivesARestart) {
  {
    auto profile = OpenFile();
    for (int i = 0; i < 3; ++i) profile->Record(Spec("model \"x\"\n"), 16);
    ASSERT_TRUE(profile->Flush().ok());
    EXPECT_EQ(profile->writes(), 1);
    ASSERT_TRUE(profile->Flush().ok());
    EXPECT_EQ(profile->writes(), 1) << "nothing was new";
    profile->Record(Spec("other"), 3);  // left to the destructor
  }
  auto profile = OpenFile();
  EXPECT_EQ(profile->models(), 2);
  EXPECT_EQ(Layer(*profile, Spec("model \"x\"\n")), 16);
  EXPECT_THAT(warnings_, IsEmpty());
  EXPECT_FALSE(std::filesystem::exists(file_ + ".tmp"));
}

TEST_F(PivotProfileTest, ManyRecordsShareOneWrite) {
  auto profile = Open({.file = file_, .write_interval = absl::Milliseconds(1)});
  profile->Record(Spec(), 16);
  EXPECT_TRUE(testkit::Eventually([&] { return profile->writes() == 1; }));
  auto slow = Open({.file = file_ + "2", .write_interval = absl::Hours(1)});
  for (int i = 0; i < 1000; ++i) slow->Record(Spec(), 16);
  EXPECT_EQ(slow->writes(), 0);
  slow.reset();  // writes at once
  EXPECT_EQ(DecodePivotFile(Read(file_ + "2"))->at(0).counts.at(16), 1000);
}

TEST_F(PivotProfileTest, EveryDamageIsFoundAndTheFileSetAside) {
  {
    auto profile = OpenFile();
    for (int i = 0; i < 3; ++i) profile->Record(Spec(), 16);
  }
  const std::string good = Read(file_);
  ASSERT_TRUE(DecodePivotFile(good).ok());
  std::vector<std::string> damaged = {"", "x", "[]", "null", "{}", good.substr(0, good.size() / 2)};
  for (size_t i = 0; i + 1 < good.size(); i += 7) {  // the last byte is the line's end
    std::string flipped = good;
    flipped[i] = static_cast<char>(flipped[i] ^ 1);
    damaged.push_back(std::move(flipped));
  }
  for (size_t i = 0; i < damaged.size(); ++i) {
    SCOPED_TRACE(damaged[i]);
    std::ofstream(file_, std::ios::binary | std::ios::trunc) << damaged[i];
    warnings_.clear();
    auto profile = OpenFile();
    ASSERT_NE(profile, nullptr);
    EXPECT_EQ(profile->models(), 0);
    ASSERT_EQ(warnings_.size(), 1U);
    const std::string aside = file_ + ".damaged" + (i == 0 ? "" : absl::StrCat("-", i));
    EXPECT_THAT(warnings_[0], HasSubstr(aside));
    EXPECT_EQ(Read(aside), damaged[i]);
    EXPECT_FALSE(std::filesystem::exists(file_));
  }
}

TEST_F(PivotProfileTest, NumbersOutOfRangeAreDamage) {
  const auto decode = [](const PivotRecord& record) {
    return DecodePivotFile(EncodePivotFile({record}));
  };
  PivotRecord record = {.model = {.model_id = "m", .layers = 4}, .counts = {{3, 1}}};
  EXPECT_TRUE(decode(record).ok());
  record.counts = {{4, 1}};
  EXPECT_FALSE(decode(record).ok()) << "no such layer";
  record.counts = {{3, 0}};
  EXPECT_FALSE(decode(record).ok());
  record.counts = {{-1, 1}};
  EXPECT_FALSE(decode(record).ok());
  record.counts = {};
  EXPECT_FALSE(decode(record).ok());
  record = {.model = {.model_id = "m", .layers = 0}, .counts = {{0, 1}}};
  EXPECT_FALSE(decode(record).ok());
}

TEST_F(PivotProfileTest, AWriteThatFailsLeavesTheOldFileAndIsTriedAgain) {
  auto profile = Open({.file = file_, .write_interval = absl::Hours(1)});
  profile->Record(Spec(), 16);
  ASSERT_TRUE(profile->Flush().ok());
  const std::string before = Read(file_);
  std::filesystem::create_directory(file_ + ".tmp");  // where the new text would go
  profile->Record(Spec(), 17);
  EXPECT_FALSE(profile->Flush().ok());
  EXPECT_FALSE(profile->Flush().ok());
  EXPECT_EQ(Read(file_), before);
  EXPECT_EQ(warnings_.size(), 1U) << "one for a run of failures";
  std::filesystem::remove(file_ + ".tmp");
  EXPECT_TRUE(profile->Flush().ok());
  EXPECT_EQ(DecodePivotFile(Read(file_))->at(0).counts.size(), 2U);
}

TEST_F(PivotProfileTest, ADirectoryThatIsMissingFailsTheStart) {
  const auto profile = PivotProfile::Open({.file = directory_.Path("none/profile.json")});
  ASSERT_FALSE(profile.ok());
  EXPECT_EQ(profile.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(profile.status().message()), HasSubstr("none"));
}

TEST_F(PivotProfileTest, ThreadsLoseNothing) {
  constexpr int kThreads = 4;
  constexpr int kRecords = 500;
  {
    auto profile = Open({.file = file_, .write_interval = absl::ZeroDuration()});
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&profile, t] {
        for (int i = 0; i < kRecords; ++i) {
          profile->Record(Spec(absl::StrCat("m", i % 3)), t);
          engine::PromptSpec spec = Spec("m0");
          profile->Resolve(&spec);
          if (i % 100 != 0) continue;
          EXPECT_TRUE(profile->Flush().ok());
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  const auto records = DecodePivotFile(Read(file_));
  ASSERT_TRUE(records.ok()) << records.status();
  int64_t prompts = 0;
  for (const PivotRecord& record : *records) {
    EXPECT_EQ(record.counts.size(), static_cast<size_t>(kThreads));
    for (const auto& [layer, count] : record.counts) prompts += count;
  }
  EXPECT_EQ(prompts, kThreads * kRecords);
}

}  // namespace
}  // namespace structkv::session
