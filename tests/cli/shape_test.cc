// Captures of every shape through the command's parts: what is sent, what is written, and the error
// of attention that compare measures.
#include <cmath>
#include <string>
#include <utility>

#include "client/cli/attention_error.h"
#include "client/cli/capture.h"
#include "client/cli/compacted_file.h"
#include "client/cli/compressor.h"
#include "client/cli/in_process.h"
#include "client/cli/safetensors.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/cli/capture_maker.h"
#include "tests/testing/process.h"
#include "tests/testing/prompt_data.h"

namespace structkv::cli {
namespace {

using ::testing::HasSubstr;

v1::Open MlaOpen() {
  v1::Open open = testkit::SmallOpen(300);
  v1::ModelGeometry* geometry = open.mutable_geometry();
  geometry->set_layer_count(3);
  geometry->set_kv_head_count(1);
  geometry->set_key_dim(576);
  geometry->set_value_dim(512);
  geometry->set_values_in_keys(true);
  open.set_attention_scale(1 / std::sqrt(192.0));
  return open;
}

struct Measured {
  AttentionError error;
  client::Compressed compressed;
};

class ShapeTest : public ::testing::Test {
 protected:
  Capture OpenCapture(const v1::Open& open, uint64_t seed) {
    const std::string path = directory_.Path("capture.safetensors");
    EXPECT_EQ(WriteCapture(path, open, /*future_tokens=*/20, seed), absl::OkStatus());
    absl::StatusOr<Capture> capture = Capture::Open(path);
    EXPECT_TRUE(capture.ok()) << capture.status();
    return *std::move(capture);
  }

  Measured Measure(const Capture& capture) {
    Measured measured;
    const auto compressor = *MakeInProcessCompressor("cpu", 2);
    v1::Open open = capture.MakeOpen();
    EXPECT_EQ(capture.SetStatistic(&open), absl::OkStatus());
    v1::Opened opened;
    client::SessionOptions options;
    options.on_opened = [&opened](const v1::Opened& o) { opened = o; };
    absl::StatusOr<client::Compressed> compressed = compressor->Collect(
        open, [&](uint32_t layer) { return capture.Layer(layer, opened); }, options);
    EXPECT_TRUE(compressed.ok()) << compressed.status();
    measured.compressed = *std::move(compressed);
    measured.error = CompareAttention(*FullAttention(capture),
                                      *CompactedAttention(capture, measured.compressed));
    return measured;
  }

  testkit::TemporaryDirectory directory_;
};

// Values as a view of the keys and the same values in a tensor of their own are the same attention.
TEST_F(ShapeTest, ErrorOfAttentionWithValuesInTheKeys) {
  const v1::Open open = MlaOpen();
  const Capture capture = OpenCapture(open, 4);
  EXPECT_EQ(capture.kv_bytes(), 3 * 300 * 576 * 2);
  const Measured measured = Measure(capture);
  EXPECT_TRUE(measured.compressed.layers[0].values.empty());
  EXPECT_TRUE(measured.compressed.summary.values_in_keys());

  // The first layer again, straight from the formula.
  const testkit::PromptData prompt(open, 4);
  v1::Open after = open;
  after.set_prompt_tokens(20);
  after.mutable_method()->mutable_structkv()->set_window_tokens(20);
  const testkit::PromptData future(after, 5);
  const auto keys = [&](const testkit::PromptData& data, size_t token, size_t i) {
    return testkit::ElementAt(v1::DTYPE_BF16, data.tensor(0, v1::TENSOR_KEYS), token * 576 + i);
  };
  // The output of `query` of `head` over the prompt's tokens `kept` and the future's.
  const auto attend = [&](size_t head, size_t query, absl::Span<const int32_t> kept) {
    std::vector<double> out(512);
    double total = 0;
    const auto add = [&](const testkit::PromptData& data, size_t token) {
      double dot = 0;
      for (size_t i = 0; i < 576; ++i) {
        dot += testkit::ElementAt(v1::DTYPE_BF16, future.tensor(0, v1::TENSOR_WINDOW_QUERIES),
                                  (head * 20 + query) * 576 + i) *
               keys(data, token, i);
      }
      const double weight = std::exp(dot / std::sqrt(192.0));
      total += weight;
      for (size_t i = 0; i < 512; ++i) out[i] += weight * keys(data, token, i);
    };
    for (const int32_t token : kept) add(prompt, token);
    for (size_t token = 0; token <= query; ++token) add(future, token);
    for (double& value : out) value /= total;
    return out;
  };
  std::vector<int32_t> all(300);
  for (int32_t i = 0; i < 300; ++i) all[i] = i;
  double difference = 0;
  double norm = 0;
  for (size_t head = 0; head < 4; ++head) {
    for (size_t query = 0; query < 20; ++query) {
      const std::vector<double> full = attend(head, query, all);
      const std::vector<double> kept =
          attend(head, query, measured.compressed.layers[0].position_values());
      for (size_t i = 0; i < 512; ++i) {
        difference += (kept[i] - full[i]) * (kept[i] - full[i]);
        norm += full[i] * full[i];
      }
    }
  }
  EXPECT_NEAR(measured.error.layers[0], std::sqrt(difference / norm), 1e-4);
}

TEST_F(ShapeTest, TheFileSaysThatValuesAreInTheKeys) {
  const Capture capture = OpenCapture(MlaOpen(), 6);
  const Measured measured = Measure(capture);
  const std::string path = directory_.Path("out.safetensors");
  const auto file = CompactedFile::Create(path, capture.MakeOpen(), measured.compressed.opened, {});
  ASSERT_TRUE(file.ok()) << file.status();
  for (const client::LayerResult& layer : measured.compressed.layers) {
    ASSERT_EQ((*file)->Add(layer), absl::OkStatus());
  }
  ASSERT_EQ((*file)->Add(*measured.compressed.pivot), absl::OkStatus());
  ASSERT_EQ((*file)->Finish(measured.compressed.summary), absl::OkStatus());
  const auto written = SafetensorsFile::Open(path);
  ASSERT_TRUE(written.ok()) << written.status();
  EXPECT_NE((*written)->Find("layer.0.k"), nullptr);
  EXPECT_EQ((*written)->Find("layer.0.v"), nullptr);
  EXPECT_EQ((*written)->metadata().at("values_in_keys"), "true");
  EXPECT_EQ(std::stod((*written)->metadata().at("attention_scale")), 1 / std::sqrt(192.0));
}

// What fp8 keys and values with scales stand for, written out in float32, is the same attention.
TEST_F(ShapeTest, ErrorOfAttentionOfFp8) {
  for (const v1::DType dtype : {v1::DTYPE_F8_E4M3, v1::DTYPE_F8_E5M2}) {
    for (const v1::KvScales kind :
         {v1::KV_SCALES_NONE, v1::KV_SCALES_PER_TENSOR, v1::KV_SCALES_PER_KV_HEAD}) {
      SCOPED_TRACE(v1::DType_Name(dtype) + " " + v1::KvScales_Name(kind));
      v1::Open open = testkit::SmallOpen(300);
      open.set_dtype(dtype);
      open.set_kv_scales(kind);
      open.set_query_dtype(v1::DTYPE_F32);
      const Capture capture = OpenCapture(open, 8);
      EXPECT_EQ(capture.kv_bytes(), 4 * 300 * 2 * 64);
      const Measured fp8 = Measure(capture);
      const size_t scales = kind == v1::KV_SCALES_NONE         ? 0
                            : kind == v1::KV_SCALES_PER_TENSOR ? 4
                                                               : 8;
      EXPECT_EQ(fp8.compressed.layers[0].key_scales.size(), scales);
      EXPECT_EQ(fp8.compressed.layers[0].value_scales.size(), scales);
      const std::string wide = directory_.Path("wide.safetensors");
      ASSERT_EQ(WriteWidened(capture, wide), absl::OkStatus());
      const absl::StatusOr<Capture> widened = Capture::Open(wide);
      ASSERT_TRUE(widened.ok()) << widened.status();
      const Measured f32 = Measure(*widened);
      for (size_t layer = 0; layer < 4; ++layer) {
        EXPECT_TRUE(fp8.compressed.layers[layer].position_values() ==
                    f32.compressed.layers[layer].position_values());
        EXPECT_NEAR(fp8.error.layers[layer], f32.error.layers[layer], 1e-5);
      }
    }
  }
}

TEST_F(ShapeTest, BadScalesOfACaptureAreNamed) {
  const std::string path = directory_.Path("capture.safetensors");
  v1::Open open = testkit::SmallOpen(40);
  open.set_dtype(v1::DTYPE_F8_E4M3);
  open.set_query_dtype(v1::DTYPE_F8_E4M3);
  ASSERT_EQ(WriteCapture(path, open, 2, 1), absl::OkStatus());
  EXPECT_THAT(Capture::Open(path).status().ToString(),
              HasSubstr("tensor 'layer.0.q_future' is F8_E4M3, allowed are BF16, F16 and F32"));
}

TEST_F(ShapeTest, BadMetadataIsNamed) {
  const std::string path = directory_.Path("capture.safetensors");
  v1::Open open = testkit::SmallOpen(40);
  open.mutable_geometry()->set_value_dim(64);
  open.mutable_geometry()->set_values_in_keys(true);
  ASSERT_EQ(WriteCapture(path, open, 2, 1), absl::OkStatus());
  EXPECT_THAT(Capture::Open(path).status().ToString(),
              HasSubstr("metadata 'value_dim' is 64, at most 'head_dim' (32)"));
  open = testkit::SmallOpen(40);
  open.set_attention_scale(-1);
  ASSERT_EQ(WriteCapture(path, open, 2, 1), absl::OkStatus());
  EXPECT_THAT(Capture::Open(path).status().ToString(),
              HasSubstr("metadata 'attention_scale' is '-1'"));
}

}  // namespace
}  // namespace structkv::cli
