// What engine::Prompt refuses, and what becomes of a prompt that failed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "service/engine/nonfinite.h"
#include "service/engine/prompt.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::engine {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testkit::PromptData;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<std::string> Backends() {
  std::vector<std::string> names = testing::BackendsUnderTest();
  names.resize(std::min<size_t>(names.size(), 2));
  return names;
}

class PromptErrorTest : public ::testing::TestWithParam<std::string> {
 protected:
  ~PromptErrorTest() override {
    prompt_.reset();
    EXPECT_EQ(pool_.in_use_bytes(), 0U);
  }

  void Use(const std::string& name) {
    data_.emplace(testkit::FindCase(name).open, 7);
    spec_ = testkit::SpecOf(data_->open());
    prompt_.emplace(spec_, backend_.get(), &pool_);
  }
  LayerInput Input(uint32_t layer) { return testkit::InputOf(*data_, layer, &pool_); }
  absl::Status Compress(LayerInput input) {
    return prompt_->CompressLayer(std::move(input), SerialFor).status();
  }
  absl::Status Compress(uint32_t layer) { return Compress(Input(layer)); }

  // The prompt failed at layer 1: no layer is answered any more, not even a good one, and no pivot
  // comes.
  void ExpectOfNoFurtherUse() {
    EXPECT_EQ(Compress(2).code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(Compress(1).code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_FALSE(prompt_->TakePivot().has_value());
    EXPECT_FALSE(prompt_->done());
  }
  void ExpectBad(const absl::Status& status, const std::vector<std::string>& parts) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    for (const std::string& part : parts) {
      EXPECT_THAT(std::string(status.message()), HasSubstr(part));
    }
    ExpectOfNoFurtherUse();
  }

  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(GetParam());
  BufferPool pool_{size_t{1} << 20};
  std::optional<PromptData> data_;
  PromptSpec spec_;
  std::optional<Prompt> prompt_;
};

INSTANTIATE_TEST_SUITE_P(Backends, PromptErrorTest, ::testing::ValuesIn(Backends()),
                         [](const auto& each) { return each.param; });

TEST_P(PromptErrorTest, LayersThatDoNotExist) {
  Use("StructKv");
  for (const int64_t layer : {int64_t{-1}, int64_t{4}, int64_t{1} << 40}) {
    LayerInput input = Input(0);
    input.layer = layer;
    const absl::Status status = Compress(std::move(input));
    EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange) << status;
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr(std::to_string(layer)), HasSubstr("[0, 3]")));
  }
  EXPECT_TRUE(Compress(0).ok());  // the prompt is as good as before
}

TEST_P(PromptErrorTest, ALayerTwice) {
  Use("StructKv");
  EXPECT_TRUE(Compress(1).ok());
  const absl::Status status = Compress(1);
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 1"));
  for (const uint32_t layer : {0U, 2U, 3U}) EXPECT_TRUE(Compress(layer).ok());
  EXPECT_TRUE(prompt_->done());
  EXPECT_EQ(Compress(3).code(), absl::StatusCode::kAlreadyExists);
}

TEST_P(PromptErrorTest, TensorsOfAnotherSize) {
  Use("StructKvLse");
  const auto check = [&](Buffer LayerInput::*tensor, const std::string& name) {
    const size_t needed = (Input(0).*tensor).size();
    for (const size_t size : {size_t{0}, needed - 1, needed + 1}) {
      LayerInput input = Input(0);
      input.*tensor = pool_.Acquire(size);
      const absl::Status status = Compress(std::move(input));
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
      EXPECT_THAT(std::string(status.message()),
                  AllOf(HasSubstr("layer 0: " + name), HasSubstr(std::to_string(size) + " bytes"),
                        HasSubstr(std::to_string(needed) + " are needed")));
    }
  };
  check(&LayerInput::keys, "keys");
  check(&LayerInput::values, "values");
  check(&LayerInput::window_queries, "window_queries");
  check(&LayerInput::window_lse, "window_lse");
  LayerInput input = Input(0);
  input.saliency = pool_.Acquire(4);  // which this prompt does not have
  EXPECT_THAT(std::string(Compress(std::move(input)).message()),
              HasSubstr("saliency: 4 bytes came, 0 are needed"));
  for (uint32_t layer = 0; layer < 4; ++layer) EXPECT_TRUE(Compress(layer).ok());
}

TEST_P(PromptErrorTest, AGivenSaliencyThatIsNoSaliency) {
  const std::pair<float, const char*> bad[] = {
      {std::nanf(""), "nan"}, {kInfinity, "inf"}, {-kInfinity, "-inf"}, {-1.5F, "-1.5"}};
  for (const auto& [value, text] : bad) {
    Use("StructKvSaliencyPerKvHead");
    ASSERT_TRUE(Compress(0).ok());
    LayerInput input = Input(1);
    // Of several the lowest token is named, and of its heads the lowest.
    const int64_t tokens = spec_.prompt_tokens;
    input.saliency.as<float>()[137] = value;
    input.saliency.as<float>()[tokens + 136] = value;
    input.saliency.as<float>()[tokens + 199] = value;
    const absl::Status status = Compress(std::move(input));
    EXPECT_EQ(IsNonFinite(status), !std::isfinite(value)) << status;
    ExpectBad(status, {"layer 1: ", "token 136 ", "(KV head 1)", std::string(" is ") + text});
  }
}

TEST_P(PromptErrorTest, AGivenSumOfSaliencyThatIsNone) {
  Use("StructKvSaliency");
  ASSERT_TRUE(Compress(0).ok());
  LayerInput input = Input(1);
  input.saliency.as<float>()[199] = -0.25F;
  ExpectBad(Compress(std::move(input)), {"layer 1: ", "token 199 ", "-0.25"});
}

TEST_P(PromptErrorTest, SaliencyThatIsZeroEverywhere) {
  Use("StructKvSaliency");
  ASSERT_TRUE(Compress(0).ok());
  LayerInput input = Input(1);
  for (int64_t j = 0; j < spec_.prompt_tokens; ++j) input.saliency.as<float>()[j] = 0;
  ExpectBad(Compress(std::move(input)), {"layer 1: ", "zero for every token"});
}

TEST_P(PromptErrorTest, SaliencyTooLargeToSumUp) {
  for (const char* name : {"StructKvSaliency", "StructKvSaliencyPerKvHead"}) {
    Use(name);
    ASSERT_TRUE(Compress(0).ok());
    LayerInput input = Input(1);
    input.saliency.as<float>()[3] = 3e38F;
    input.saliency.as<float>()[input.saliency.size() / 4 - 1] = 3e38F;
    ExpectBad(Compress(std::move(input)), {"layer 1: ", "1e+30"});
  }
}

TEST_P(PromptErrorTest, KeysAndQueriesThatAreNotFinite) {
  for (const float value : {std::nanf(""), kInfinity, -kInfinity}) {
    Use("StructKv");  // bf16, 2 KV heads of 32, a window of 8 rows, 200 tokens
    ASSERT_TRUE(Compress(0).ok());
    testkit::SetElement(v1::DTYPE_BF16, value, (200 + 55) * 32 + 31,
                        data_->mutable_tensor(1, v1::TENSOR_KEYS));
    const absl::Status status = Compress(1);
    EXPECT_TRUE(IsNonFinite(status)) << status;
    ExpectBad(status, {"layer 1: ", "token 55 ", "(KV head 1)"});

    Use("StructKv");
    ASSERT_TRUE(Compress(0).ok());
    testkit::SetElement(v1::DTYPE_BF16, value, (3 * 8 + 2) * 32,  // query head 3, row 2
                        data_->mutable_tensor(1, v1::TENSOR_WINDOW_QUERIES));
    ExpectBad(Compress(1), {"layer 1: ", "token 194 ", "(KV head 1)"});

    Use("StructKvLse");
    ASSERT_TRUE(Compress(0).ok());
    testkit::SetElement(v1::DTYPE_F32, value, 8 + 7,  // query head 1, row 7
                        data_->mutable_tensor(1, v1::TENSOR_WINDOW_LSE));
    ExpectBad(Compress(1), {"layer 1: ", "token 199 ", "(KV head 0)"});
  }
}

// Values are moved, never looked at.
TEST_P(PromptErrorTest, ValuesMayBeAnything) {
  Use("StructKv");
  testkit::SetElement(v1::DTYPE_BF16, std::nanf(""), 0,
                      data_->mutable_tensor(0, v1::TENSOR_VALUES));
  EXPECT_TRUE(Compress(0).ok());
}

TEST_P(PromptErrorTest, AFailureAfterTheLastButOneLayerLeavesNoPivot) {
  Use("StructKv");
  for (const uint32_t layer : {0U, 2U, 3U}) EXPECT_TRUE(Compress(layer).ok());
  testkit::SetElement(v1::DTYPE_BF16, kInfinity, 0, data_->mutable_tensor(1, v1::TENSOR_KEYS));
  ExpectBad(Compress(1), {"layer 1: ", "token 0 ", "(KV head 0)"});
}

}  // namespace
}  // namespace structkv::engine
