// Rotary parameters that make no sense: refused before anything is reserved, with the field, the
// value and the limit named.
#include <cmath>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using Rotary = v1::RotaryParameters;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// A valid set of each type.
Rotary Valid(v1::RopeType type) {
  Rotary rotary;
  rotary.set_rope_theta(10000);
  rotary.set_rope_type(type);
  if (type != v1::ROPE_TYPE_DEFAULT) rotary.set_factor(4);
  if (type == v1::ROPE_TYPE_DYNAMIC) rotary.set_max_position_embeddings(2048);
  if (type == v1::ROPE_TYPE_YARN || type == v1::ROPE_TYPE_LLAMA3) {
    rotary.set_original_max_position_embeddings(8192);
  }
  if (type == v1::ROPE_TYPE_LLAMA3) {
    rotary.set_low_freq_factor(1);
    rotary.set_high_freq_factor(4);
  }
  return rotary;
}

struct RotaryCase {
  std::string name;
  v1::RopeType type;
  std::function<void(Rotary*)> break_it;
  std::vector<std::string> texts;
};

void PrintTo(const RotaryCase& rotary_case, std::ostream* out) { *out << rotary_case.name; }

class BadRotaryTest : public ServiceTest, public ::testing::WithParamInterface<RotaryCase> {};

TEST_P(BadRotaryTest, IsRefused) {
  Start();
  v1::Open open = SmallOpen();
  *open.mutable_rotary() = Valid(GetParam().type);
  GetParam().break_it(open.mutable_rotary());
  const Outcome outcome = Run({OpenMessage(open)});
  ExpectFailure(outcome, grpc::StatusCode::INVALID_ARGUMENT, GetParam().texts);
  EXPECT_THAT(outcome.responses, ::testing::IsEmpty()) << "nothing may be opened";
}

constexpr auto kDefault = v1::ROPE_TYPE_DEFAULT;
constexpr auto kLinear = v1::ROPE_TYPE_LINEAR;
constexpr auto kDynamic = v1::ROPE_TYPE_DYNAMIC;
constexpr auto kYarn = v1::ROPE_TYPE_YARN;
constexpr auto kLlama3 = v1::ROPE_TYPE_LLAMA3;

std::vector<RotaryCase> ValueCases() {
  return {
      {"NoTheta",
       kDefault,
       [](Rotary* r) { r->clear_rope_theta(); },
       {"open.rotary.rope_theta", "not set"}},
      {"ZeroTheta",
       kDefault,
       [](Rotary* r) { r->set_rope_theta(0); },
       {"open.rotary.rope_theta: 0", "(1, 1e+30]"}},
      {"NegativeTheta",
       kDefault,
       [](Rotary* r) { r->set_rope_theta(-10000); },
       {"open.rotary.rope_theta: -10000"}},
      {"ThetaOne",
       kDefault,
       [](Rotary* r) { r->set_rope_theta(1); },
       {"open.rotary.rope_theta: 1"}},
      {"NanTheta",
       kDefault,
       [](Rotary* r) { r->set_rope_theta(kNan); },
       {"open.rotary.rope_theta: nan"}},
      {"InfiniteTheta",
       kDefault,
       [](Rotary* r) { r->set_rope_theta(kInf); },
       {"open.rotary.rope_theta: inf"}},
      {"UnknownType",
       kDefault,
       [](Rotary* r) { r->set_rope_type(static_cast<v1::RopeType>(9)); },
       {"open.rotary.rope_type is 9", "ROPE_TYPE_LLAMA3"}},
      {"UnknownPairing",
       kDefault,
       [](Rotary* r) { r->set_pairing(static_cast<v1::RotaryPairing>(3)); },
       {"open.rotary.pairing is 3", "ROTARY_PAIRING_INTERLEAVED"}},
      {"SmallFactor",
       kLinear,
       [](Rotary* r) { r->set_factor(0.5); },
       {"open.rotary.factor: 0.5", "[1, 1e+06]"}},
      {"NanFactor", kLlama3, [](Rotary* r) { r->set_factor(kNan); }, {"open.rotary.factor: nan"}},
      {"LargeFactor", kYarn, [](Rotary* r) { r->set_factor(1e7); }, {"open.rotary.factor: 1e+07"}},
      {"NoContext",
       kYarn,
       [](Rotary* r) { r->set_original_max_position_embeddings(0); },
       {"open.rotary.original_max_position_embeddings: 0"}},
      {"NoLongest",
       kDynamic,
       [](Rotary* r) { r->set_max_position_embeddings(0); },
       {"open.rotary.max_position_embeddings: 0"}},
      {"ZeroBeta", kYarn, [](Rotary* r) { r->set_beta_fast(0); }, {"open.rotary.beta_fast: 0"}},
      {"NanBeta", kYarn, [](Rotary* r) { r->set_beta_slow(kNan); }, {"open.rotary.beta_slow: nan"}},
      {"BetasSwapped",
       kYarn,
       [](Rotary* r) {
         r->set_beta_fast(1);
         r->set_beta_slow(32);
       },
       {"open.rotary.beta_fast: 1", "beta_slow, 32"}},
      {"EqualFreqFactors",
       kLlama3,
       [](Rotary* r) { r->set_low_freq_factor(4); },
       {"open.rotary.low_freq_factor: 4", "high_freq_factor, 4"}},
      {"FreqFactorsSwapped",
       kLlama3,
       [](Rotary* r) { r->set_low_freq_factor(5); },
       {"open.rotary.low_freq_factor: 5", "high_freq_factor, 4"}},
      {"ZeroLowFreqFactor",
       kLlama3,
       [](Rotary* r) { r->set_low_freq_factor(0); },
       {"open.rotary.low_freq_factor: 0"}},
      {"InfiniteHighFreqFactor",
       kLlama3,
       [](Rotary* r) { r->set_high_freq_factor(kInf); },
       {"open.rotary.high_freq_factor: inf"}},
      {"OddDim",
       kDefault,
       [](Rotary* r) { r->set_rotary_dim(15); },
       {"open.rotary.rotary_dim: 15", "not even"}},
      {"OddRest",
       kDefault,
       [](Rotary* r) { r->set_rotary_offset(3); },
       {"open.rotary.rotary_dim: 29", "not even"}},
      {"NoDim",
       kDefault,
       [](Rotary* r) { r->set_rotary_dim(0); },
       {"open.rotary.rotary_dim: 0", "[2, 32]"}},
      {"LargeDim",
       kDefault,
       [](Rotary* r) { r->set_rotary_dim(34); },
       {"open.rotary.rotary_dim: 34", "key_dim 32"}},
      {"PartPastTheKey",
       kDefault,
       [](Rotary* r) {
         r->set_rotary_dim(16);
         r->set_rotary_offset(20);
       },
       {"open.rotary.rotary_dim: 16", "[2, 12]", "rotary_offset 20"}},
      {"OffsetPastTheKey",
       kDefault,
       [](Rotary* r) { r->set_rotary_offset(32); },
       {"open.rotary.rotary_offset: 32", "key_dim 32"}},
      {"LargestOffset",
       kDefault,
       [](Rotary* r) { r->set_rotary_offset(0xffffffff); },
       {"open.rotary.rotary_offset: 4294967295"}},
      {"DynamicOfTwo",
       kDynamic,
       [](Rotary* r) { r->set_rotary_dim(2); },
       {"open.rotary.rotary_dim: 2", "[4, 32]"}},
  };
}

// Parameters that the type needs, and those that it does not have.
std::vector<RotaryCase> TypeCases() {
  const auto missing = [](const std::string& name, v1::RopeType type, const std::string& field,
                          std::function<void(Rotary*)> clear) {
    return RotaryCase{name,
                      type,
                      std::move(clear),
                      {"open.rotary." + field + " is not set", v1::RopeType_Name(type)}};
  };
  const auto foreign = [](const std::string& name, v1::RopeType type, const std::string& field,
                          std::function<void(Rotary*)> set) {
    return RotaryCase{
        name,
        type,
        std::move(set),
        {"open.rotary." + field + " is ", v1::RopeType_Name(type), "has no such parameter"}};
  };
  return {
      missing("LinearNoFactor", kLinear, "factor", [](Rotary* r) { r->clear_factor(); }),
      missing("DynamicNoFactor", kDynamic, "factor", [](Rotary* r) { r->clear_factor(); }),
      missing("DynamicNoLongest", kDynamic, "max_position_embeddings",
              [](Rotary* r) { r->clear_max_position_embeddings(); }),
      missing("YarnNoContext", kYarn, "original_max_position_embeddings",
              [](Rotary* r) { r->clear_original_max_position_embeddings(); }),
      missing("Llama3NoContext", kLlama3, "original_max_position_embeddings",
              [](Rotary* r) { r->clear_original_max_position_embeddings(); }),
      missing("Llama3NoLow", kLlama3, "low_freq_factor",
              [](Rotary* r) { r->clear_low_freq_factor(); }),
      missing("Llama3NoHigh", kLlama3, "high_freq_factor",
              [](Rotary* r) { r->clear_high_freq_factor(); }),
      foreign("DefaultFactor", kDefault, "factor", [](Rotary* r) { r->set_factor(2); }),
      foreign("LinearContext", kLinear, "original_max_position_embeddings",
              [](Rotary* r) { r->set_original_max_position_embeddings(8192); }),
      foreign("YarnLongest", kYarn, "max_position_embeddings",
              [](Rotary* r) { r->set_max_position_embeddings(8192); }),
      foreign("Llama3BetaFast", kLlama3, "beta_fast", [](Rotary* r) { r->set_beta_fast(32); }),
      foreign("DynamicBetaSlow", kDynamic, "beta_slow", [](Rotary* r) { r->set_beta_slow(1); }),
      foreign("DefaultTruncate", kDefault, "truncate", [](Rotary* r) { r->set_truncate(true); }),
      foreign("YarnLow", kYarn, "low_freq_factor", [](Rotary* r) { r->set_low_freq_factor(1); }),
      foreign("LinearHigh", kLinear, "high_freq_factor",
              [](Rotary* r) { r->set_high_freq_factor(4); }),
  };
}

const auto kName = [](const auto& instance) { return instance.param.name; };
INSTANTIATE_TEST_SUITE_P(Values, BadRotaryTest, ::testing::ValuesIn(ValueCases()), kName);
INSTANTIATE_TEST_SUITE_P(Types, BadRotaryTest, ::testing::ValuesIn(TypeCases()), kName);

class RotaryOutputTest : public ServiceTest {};

// What the cases above break is right before.
TEST_F(RotaryOutputTest, TakesEveryType) {
  Start();
  for (const v1::RopeType type : {kDefault, kLinear, kDynamic, kYarn, kLlama3}) {
    v1::Open open = SmallOpen();
    *open.mutable_rotary() = Valid(type);
    Call call(channel());
    call.Send(OpenMessage(open));
    const auto opened = call.WaitForOpened();
    ASSERT_TRUE(opened) << v1::RopeType_Name(type);
    EXPECT_EQ(opened->rotary().rope_type(), type);
    EXPECT_EQ(opened->rotary().rotary_dim(), 32);
    EXPECT_EQ(opened->rotary().pairing(), v1::ROTARY_PAIRING_HALF_SPLIT);
    EXPECT_EQ(opened->rotary().has_beta_fast(), type == kYarn);
  }
}

TEST_F(RotaryOutputTest, APlanHasNoKeysToTurn) {
  Start();
  v1::Open plan = SmallOpen();
  *plan.mutable_rotary() = Valid(kDefault);
  plan.set_output(v1::OUTPUT_PLAN);
  ExpectFailure(Run({OpenMessage(plan)}), grpc::StatusCode::INVALID_ARGUMENT,
                {"open.rotary", "PLAN"});
  plan.mutable_method()->mutable_gemfilter()->set_filter_layer(1);
  ExpectFailure(Run({OpenMessage(plan)}), grpc::StatusCode::INVALID_ARGUMENT,
                {"open.rotary", "PLAN"});
}

TEST_F(RotaryOutputTest, KeysOfFp8AreNotTurned) {
  Start();
  for (const v1::DType dtype : {v1::DTYPE_F8_E4M3, v1::DTYPE_F8_E5M2}) {
    v1::Open open = SmallOpen();
    *open.mutable_rotary() = Valid(kDefault);
    open.set_dtype(dtype);
    const Outcome outcome = Run({OpenMessage(open)});
    ExpectFailure(
        outcome, grpc::StatusCode::INVALID_ARGUMENT,
        {"open.rotary", dtype == v1::DTYPE_F8_E4M3 ? "f8_e4m3" : "f8_e5m2", "f32, f16, bf16"});
    EXPECT_THAT(outcome.responses, ::testing::IsEmpty());
    ExpectMemoryBack();
  }
}

TEST_F(RotaryOutputTest, PulledKeysAreNotTurned) {
  Start();
  v1::Open open = SmallOpen();
  *open.mutable_rotary() = Valid(kDefault);
  open.set_statistic(v1::STATISTIC_SALIENCY);
  open.set_pull(v1::PULL_KEYS_AND_VALUES);
  ExpectFailure(Run({OpenMessage(open)}), grpc::StatusCode::INVALID_ARGUMENT,
                {"open.rotary", "KEYS_AND_VALUES", "NONE or VALUES"});
}

}  // namespace
}  // namespace structkv::testkit
