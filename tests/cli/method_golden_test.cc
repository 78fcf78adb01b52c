// The captured prompt of a real model, against what other implementations keep of it: kvpress's own
// code, and PyTorch from the methods' publications (tests/data/make_method_golden.py).
#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "client/cli/capture.h"
#include "client/cli/compressor.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace structkv::cli {
namespace {

using Json = nlohmann::json;

const Json& Golden() {
  static const Json golden =
      Json::parse(std::ifstream(STRUCTKV_TEST_DATA "/golden-methods-tiny-llama-1000.json"));
  return golden;
}

std::string DataPath(const char* key) {
  return STRUCTKV_TEST_DATA "/" + Golden().at(key).get<std::string>();
}

// The sets may differ in the positions that are too close to call, and nowhere else.
void ExpectSame(const std::vector<int32_t>& got, const Json& want_json, const Json& close_json,
                const std::string& what) {
  const auto want = want_json.get<std::vector<int32_t>>();
  const auto close = close_json.get<std::set<int32_t>>();
  EXPECT_EQ(got.size(), want.size()) << what;
  EXPECT_TRUE(std::is_sorted(got.begin(), got.end())) << what;
  std::vector<int32_t> different;
  std::set_symmetric_difference(got.begin(), got.end(), want.begin(), want.end(),
                                std::back_inserter(different));
  for (int32_t position : different) {
    EXPECT_TRUE(close.count(position) > 0) << what << ": position " << position;
  }
}

class MethodGoldenTest : public ::testing::TestWithParam<std::tuple<std::string, size_t>> {};

TEST_P(MethodGoldenTest, KeepsWhatOthersKeep) {
  const auto& [backend, index] = GetParam();
  const Json& wanted = Golden().at("cases").at(index);
  auto capture = Capture::Open(DataPath("capture"));
  ASSERT_TRUE(capture.ok()) << capture.status();
  const absl::Status sums = capture->ReadColumnSums(DataPath("column_sums"));
  ASSERT_TRUE(sums.ok()) << sums;
  v1::Open open = capture->MakeOpen();
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(wanted.at("method").get<std::string>(),
                                                            open.mutable_method()));
  const absl::Status statistic = capture->SetStatistic(&open);
  ASSERT_TRUE(statistic.ok()) << statistic;
  open.set_output(v1::OUTPUT_PLAN);
  ConnectionFlags flags;
  flags.in_process = true;
  flags.backend = backend;
  flags.threads = 2;
  const auto compressor = MakeCompressor(flags);
  ASSERT_TRUE(compressor.ok()) << compressor.status();
  v1::Opened opened;
  client::SessionOptions options;
  options.on_opened = [&](const v1::Opened& o) { opened = o; };
  const auto compressed =
      (*compressor)
          ->Collect(
              open, [&](uint32_t layer) { return capture->Layer(layer, opened); }, options);
  ASSERT_TRUE(compressed.ok()) << compressed.status();

  ASSERT_EQ(compressed->layers.size(), wanted.at("layers").size());
  for (size_t l = 0; l < compressed->layers.size(); ++l) {
    const client::LayerResult& layer = compressed->layers[l];
    const Json& want = wanted.at("layers").at(l);
    const auto positions = layer.position_values();
    const size_t heads = want.at("positions").size();
    const bool one_set = positions.size() == layer.kept_tokens;
    ASSERT_EQ(positions.size(), (one_set ? 1 : heads) * layer.kept_tokens) << l;
    for (size_t head = 0; head < heads; ++head) {
      const auto part =
          positions.subspan(one_set ? 0 : head * layer.kept_tokens, layer.kept_tokens);
      ExpectSame({part.begin(), part.end()}, want.at("positions").at(head),
                 want.at("close").at(head),
                 "layer " + std::to_string(l) + ", head " + std::to_string(head));
    }
  }
  if (!wanted.contains("pivot")) return;
  ASSERT_TRUE(compressed->pivot.has_value());
  const Json& pivot = wanted.at("pivot");
  EXPECT_EQ(compressed->pivot->pivot_layer, pivot.at("layer").get<uint32_t>());
  EXPECT_EQ(compressed->pivot->mode, v1::PIVOT_MODE_FIXED);
  EXPECT_FALSE(compressed->pivot->transition_layer.has_value());
  ExpectSame(compressed->pivot->skeleton, pivot.at("skeleton"), pivot.at("close"), "skeleton");
}

INSTANTIATE_TEST_SUITE_P(Captured, MethodGoldenTest,
                         ::testing::Combine(::testing::Values("reference", "cpu"),
                                            ::testing::Range<size_t>(0,
                                                                     Golden().at("cases").size())),
                         [](const ::testing::TestParamInfo<MethodGoldenTest::ParamType>& instance) {
                           const Json& name =
                               Golden().at("cases").at(std::get<1>(instance.param)).at("name");
                           return std::get<0>(instance.param) + "_" + name.get<std::string>();
                         });

// kvpress runs the model itself, on keys that were never rounded to BF16; what it then keeps is
// what it keeps of the capture, but for tokens that lie close to the cut.
TEST(MethodGoldenDataTest, TheCaptureStandsForTheModel) {
  size_t seen = 0;
  for (const Json& c : Golden().at("cases")) {
    if (c.at("source") != "kvpress") continue;
    EXPECT_GE(c.at("end_to_end_agreement").get<double>(), 0.99) << c.at("name");
    ++seen;
  }
  EXPECT_EQ(seen, 10);
}

}  // namespace
}  // namespace structkv::cli
