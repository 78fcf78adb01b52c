// Turned keys against Hugging Face's own rotary code (tests/data/make_rotary_golden.py).
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "client/cli/capture.h"
#include "client/cli/compressor.h"
#include "client/cli/safetensors.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "kernels/reference/element.h"
#include "nlohmann/json.hpp"
#include "service/rpc/rotary_codec.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/random_tensor.h"

namespace structkv::cli {
namespace {

using Json = nlohmann::json;

const SafetensorsFile& File() {
  static const auto file = *SafetensorsFile::Open(STRUCTKV_TEST_DATA "/golden-rotary.safetensors");
  return *file;
}

const Json& Cases() {
  static const Json cases = Json::parse(File().metadata().at("cases"));
  return cases;
}

template <typename T>
std::vector<T> Values(const std::string& name) {
  const TensorInfo* info = File().Find(name);
  EXPECT_NE(info, nullptr) << name;
  return info == nullptr ? std::vector<T>() : File().Values<T>(*info);
}

// One case: a few kept keys, the rotated part of each.
struct Golden {
  explicit Golden(size_t index)
      : json(Cases().at(index)),
        name(json.at("name").get<std::string>()),
        tokens(json.at("prompt_tokens").get<int64_t>()),
        key_dim(json.at("key_dim").get<int64_t>()),
        positions(Values<int32_t>(name + ".positions")),
        unrotated(Values<float>(name + ".unrotated")),
        before(Values<float>(name + ".before")),
        after(Values<float>(name + ".after")),
        from(Values<float>(name + ".from")),
        to(Values<float>(name + ".to")) {
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(json.at("rotary").get<std::string>(),
                                                              &parameters));
    const auto decoded = rpc::DecodeRotary(parameters, key_dim);
    EXPECT_TRUE(decoded.ok()) << decoded.status();
    rotary = *decoded;
  }
  int64_t kept() const { return static_cast<int64_t>(positions.size()); }

  const Json& json;
  const std::string name;
  const int64_t tokens;
  const int64_t key_dim;
  v1::RotaryParameters parameters;
  method::RotarySpec rotary;
  const std::vector<int32_t> positions;
  const std::vector<float> unrotated, before, after;  // [kept, rotary_dim]
  const std::vector<float> from, to;                  // [pairs]
};

// Half a unit in the last place, relative.
double Unit(DType dtype) {
  return std::ldexp(1.0, dtype == DType::kF32 ? -24 : dtype == DType::kF16 ? -11 : -8);
}

// What is not rotated, and the keys of tokens that are not kept.
float Filler(int64_t token, int64_t element) {
  return static_cast<float>((token * 7 + element * 3) % 64 - 31) / 32;
}

// A key of `dtype`: the rotated part given, the rest filled.
void WriteKey(const Golden& golden, const float* part, int64_t token, DType dtype, std::byte* row) {
  for (int64_t e = 0; e < golden.key_dim; ++e) {
    const int64_t place = e - golden.rotary.offset;
    const bool rotated = place >= 0 && place < golden.rotary.dim;
    const uint32_t bits = testing::Encode(rotated ? part[place] : Filler(token, e), dtype);
    std::memcpy(row + e * static_cast<int64_t>(DTypeSize(dtype)), &bits, DTypeSize(dtype));
  }
}

// The input was rounded to the type and the output is once more; to that come float32's roundings
// of both rotations and Hugging Face's, and `angles`, by what each pair's angle may differ.
void ExpectKey(const Golden& golden, const float* want, double scale,
               const std::vector<double>& angles, int64_t token, DType dtype, const std::byte* row,
               const std::string& where) {
  const int64_t pairs = golden.rotary.pairs();
  const bool halves = golden.rotary.pairing == RotaryPairing::kHalfSplit;
  for (int64_t j = 0; j < pairs; ++j) {
    const int64_t first = halves ? j : 2 * j;
    const int64_t second = halves ? j + pairs : 2 * j + 1;
    const double norm = std::hypot(want[first], want[second]) * scale;
    const double bound = norm * (2.5 * Unit(dtype) + 8 * Unit(DType::kF32) + angles[j]);
    for (const int64_t e : {first, second}) {
      const double got = reference::Element(row, dtype, golden.rotary.offset + e);
      ASSERT_NEAR(got, want[e] * scale, bound) << where << ", element " << e;
    }
  }
  for (int64_t e = 0; e < golden.key_dim; ++e) {
    if (e >= golden.rotary.offset && e < golden.rotary.offset + golden.rotary.dim) continue;
    ASSERT_EQ(reference::Element(row, dtype, e), Filler(token, e)) << where << ", element " << e;
  }
}

class FrequencyTest : public ::testing::TestWithParam<size_t> {};

int64_t UnitsApart(float a, float b) {
  int32_t x = 0;
  int32_t y = 0;
  std::memcpy(&x, &a, sizeof(x));
  std::memcpy(&y, &b, sizeof(y));
  return std::abs(int64_t{x} - y);
}

// Both compute in float32 step by step; the power function's last places are each library's own.
TEST_P(FrequencyTest, AreHuggingFaces) {
  const Golden golden(GetParam());
  const auto compare = [&](const std::vector<float>& got, const std::vector<float>& want) {
    ASSERT_EQ(got.size(), want.size());
    for (size_t j = 0; j < got.size(); ++j) {
      EXPECT_LE(UnitsApart(got[j], want[j]), 2) << golden.name << ", pair " << j;
    }
  };
  compare(method::InverseFrequencies(golden.rotary, golden.tokens), golden.from);
  compare(method::InverseFrequencies(golden.rotary, golden.kept()), golden.to);
}

INSTANTIATE_TEST_SUITE_P(HuggingFace, FrequencyTest, ::testing::Range<size_t>(0, Cases().size()),
                         [](const auto& instance) { return Golden(instance.param).name; });

class KernelGoldenTest : public ::testing::TestWithParam<std::tuple<std::string, size_t>> {};

// With Hugging Face's own frequencies: from the original positions, and from no rotation at all.
TEST_P(KernelGoldenTest, TurnsKeysToWhatHuggingFaceMakesOfThem) {
  const auto& [name, index] = GetParam();
  const auto backend = testing::MakeBackend(name);
  const Golden golden(index);
  const std::vector<double> exact(golden.from.size(), 0.0);
  std::vector<int32_t> rows(golden.positions.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i);
  const std::vector<int32_t> nowhere(rows.size(), 0);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const bool rotated : {true, false}) {
      testing::Tensor source(dtype, Layout::kHeadTokenDim, 1, golden.kept(), golden.key_dim);
      testing::Tensor out(dtype, Layout::kHeadTokenDim, 1, golden.kept(), golden.key_dim);
      const std::vector<float>& keys = rotated ? golden.before : golden.unrotated;
      for (int64_t i = 0; i < golden.kept(); ++i) {
        WriteKey(golden, keys.data() + i * golden.rotary.dim, i, dtype,
                 source.mutable_view().Row(0, i));
      }
      EXPECT_EQ(
          backend->GatherRotated(source.view(), rows.data(), /*per_head=*/false,
                                 {.pairing = golden.rotary.pairing,
                                  .offset = golden.rotary.offset,
                                  .pairs = golden.rotary.pairs(),
                                  .from = golden.from.data(),
                                  .to = golden.to.data(),
                                  .positions = rotated ? golden.positions.data() : nowhere.data()},
                                 out.mutable_view(), SerialFor),
          absl::OkStatus());
      // What is not rotated yet is not scaled yet.
      const double scale = rotated ? 1.0 : 1.0 / golden.json.at("scale").get<double>();
      for (int64_t i = 0; i < golden.kept(); ++i) {
        ExpectKey(golden, golden.after.data() + i * golden.rotary.dim, scale, exact, i, dtype,
                  out.view().Row(0, i),
                  std::string(DTypeName(dtype)) + ", row " + std::to_string(i));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(HuggingFace, KernelGoldenTest,
                         ::testing::Combine(::testing::ValuesIn(testing::BackendsUnderTest()),
                                            ::testing::Range<size_t>(0, Cases().size())),
                         [](const auto& instance) {
                           return std::get<0>(instance.param) + "_" +
                                  Golden(std::get<1>(instance.param)).name;
                         });

std::unique_ptr<Compressor> InProcess(const std::string& backend) {
  ConnectionFlags flags;
  flags.in_process = true;
  flags.backend = backend;
  flags.threads = 2;
  auto compressor = MakeCompressor(flags);
  EXPECT_TRUE(compressor.ok()) << compressor.status();
  return *std::move(compressor);
}

// A saliency that has exactly these tokens kept, by its share and a window of one token.
void Choose(const std::vector<int32_t>& positions, v1::Open* open, std::vector<float>* saliency) {
  v1::StructKvMethod* method = open->mutable_method()->mutable_structkv();
  method->set_window_tokens(1);
  method->mutable_kv_budget()->set_ratio(static_cast<double>(positions.size()) /
                                         open->prompt_tokens());
  open->set_statistic(v1::STATISTIC_SALIENCY);
  saliency->assign(open->prompt_tokens(), 1e-6F);
  for (int32_t position : positions) (*saliency)[position] = 1.0F;
}

class ServiceGoldenTest : public ::testing::TestWithParam<std::tuple<std::string, size_t>> {};

TEST_P(ServiceGoldenTest, AnswersTheKeysOfAShorterPrompt) {
  const auto& [backend, index] = GetParam();
  const Golden golden(index);
  const bool large = golden.tokens > 100'000;
  const DType dtype = large ? DType::kBF16 : DType::kF32;
  v1::Open open;
  open.mutable_geometry()->set_layer_count(1);
  open.mutable_geometry()->set_query_head_count(1);
  open.mutable_geometry()->set_kv_head_count(1);
  open.mutable_geometry()->set_key_dim(static_cast<uint32_t>(golden.key_dim));
  open.set_prompt_tokens(static_cast<uint32_t>(golden.tokens));
  open.set_dtype(large ? v1::DTYPE_BF16 : v1::DTYPE_F32);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  *open.mutable_rotary() = golden.parameters;
  std::vector<float> saliency;
  Choose(golden.positions, &open, &saliency);
  const size_t row_bytes = static_cast<size_t>(golden.key_dim) * DTypeSize(dtype);
  std::vector<std::byte> keys(static_cast<size_t>(golden.tokens) * row_bytes);
  for (int64_t i = 0; i < golden.kept(); ++i) {
    WriteKey(golden, golden.before.data() + i * golden.rotary.dim, i, dtype,
             keys.data() + golden.positions[i] * row_bytes);
  }
  const std::vector<std::byte> sent = large ? std::vector<std::byte>() : keys;
  const auto source = [&](uint32_t) -> absl::StatusOr<client::LayerTensors> {
    client::LayerTensors tensors;
    tensors.keys = keys;
    tensors.values = keys;
    tensors.saliency = {reinterpret_cast<const std::byte*>(saliency.data()),
                        saliency.size() * sizeof(float)};
    tensors.owner = std::make_shared<int>(0);
    return tensors;
  };
  const auto compressed = InProcess(backend)->Collect(open, source, {});
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  if (!large) {
    EXPECT_TRUE(sent == keys) << "the caller's keys were changed";
  }

  // The service's frequencies may be Hugging Face's but for the last places.
  const auto from = method::InverseFrequencies(golden.rotary, golden.tokens);
  const auto to = method::InverseFrequencies(golden.rotary, golden.kept());
  const client::LayerResult& layer = compressed->layers.at(0);
  const auto kept = static_cast<uint32_t>(golden.kept());
  ASSERT_THAT(layer.position_values(), ::testing::ElementsAreArray(golden.positions));
  for (int64_t i = 0; i < golden.kept(); ++i) {
    std::vector<double> angles;
    for (size_t j = 0; j < from.size(); ++j) {
      const auto position = static_cast<float>(golden.positions[i]);
      angles.push_back(std::fabs(double{from[j] * position} - double{golden.from[j] * position}) +
                       std::fabs(double{to[j]} - double{golden.to[j]}) * static_cast<double>(i));
    }
    const std::string where = "row " + std::to_string(i);
    ExpectKey(golden, golden.after.data() + i * golden.rotary.dim, 1.0, angles, i, dtype,
              layer.keys.data() + i * row_bytes, where);
    EXPECT_EQ(std::memcmp(layer.values.data() + i * row_bytes,
                          keys.data() + golden.positions[i] * row_bytes, row_bytes),
              0)
        << where << ": values are never turned";
  }
  EXPECT_EQ(compressed->summary.logical_length(), golden.tokens);
  EXPECT_EQ(compressed->summary.kv_length(), kept);
  EXPECT_EQ(compressed->summary.next_position(), kept);
}

INSTANTIATE_TEST_SUITE_P(HuggingFace, ServiceGoldenTest,
                         ::testing::Combine(::testing::Values("reference", "cpu"),
                                            ::testing::Range<size_t>(0, Cases().size())),
                         [](const auto& instance) {
                           return std::get<0>(instance.param) + "_" +
                                  Golden(std::get<1>(instance.param)).name;
                         });

// What the model's own k_proj gave for these tokens, rotated as if they were the prompt's first.
TEST(ModelGoldenTest, TurnedKeysAreTheModelsAtConsecutivePositions) {
  auto capture = Capture::Open(STRUCTKV_TEST_DATA "/capture-tiny-llama-1000.safetensors");
  ASSERT_TRUE(capture.ok()) << capture.status();
  v1::Open open = capture->MakeOpen();
  open.set_window_lse(false);
  open.mutable_rotary()->set_rope_theta(10000);
  const auto positions = Values<int32_t>("model.positions");
  std::vector<float> saliency;
  Choose(positions, &open, &saliency);
  const auto source = [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
    v1::Opened required;
    required.add_required_tensors(v1::TENSOR_KEYS);
    required.add_required_tensors(v1::TENSOR_VALUES);
    auto tensors = capture->Layer(layer, required);
    if (!tensors.ok()) return tensors.status();
    tensors->saliency = {reinterpret_cast<const std::byte*>(saliency.data()),
                         saliency.size() * sizeof(float)};
    return tensors;
  };
  const auto compressed = InProcess("cpu")->Collect(open, source, {});
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  const v1::ModelGeometry& geometry = capture->geometry();
  const auto dim = static_cast<int64_t>(geometry.key_dim());
  const int64_t half = dim / 2;
  v1::Opened keys_alone;
  keys_alone.add_required_tensors(v1::TENSOR_KEYS);
  double moved = 0;
  for (const int64_t l : {0, 5, 11}) {
    const client::LayerResult& layer = compressed->layers.at(l);
    const auto captured = capture->Layer(static_cast<uint32_t>(l), keys_alone);
    ASSERT_TRUE(captured.ok()) << captured.status();
    ASSERT_THAT(layer.position_values(), ::testing::ElementsAreArray(positions));
    const auto want = Values<float>("model.layer." + std::to_string(l) + ".after");
    ASSERT_EQ(want.size(), geometry.kv_head_count() * positions.size() * dim);
    for (size_t row = 0; row < want.size() / dim; ++row) {
      const std::byte* key = layer.keys.data() + row * dim * 2;
      for (int64_t e = 0; e < dim; ++e) {
        const double norm = std::hypot(want[row * dim + e], want[row * dim + (e + half) % dim]);
        const double got = reference::Element(key, DType::kBF16, e);
        // The capture's rounding, and that of the answer.
        EXPECT_NEAR(got, want[row * dim + e], 2.5 * Unit(DType::kBF16) * norm)
            << "layer " << l << ", row " << row << ", element " << e;
        const int64_t head = static_cast<int64_t>(row / positions.size());
        const int64_t token = positions[row % positions.size()];
        const std::byte* original =
            captured->keys.data() + (head * capture->prompt_tokens() + token) * dim * 2;
        moved = std::max(moved, std::fabs(reference::Element(original, DType::kBF16, e) - got));
      }
    }
  }
  EXPECT_GT(moved, 1) << "the keys must have been turned";
}

}  // namespace
}  // namespace structkv::cli
