// What each mode moves: the sizes that are computed are those that really travel, and the table in
// docs/protocol.md is the one that the command prints.
#include "client/cli/bytes_table.h"

#include <fstream>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "client/cli/in_process.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/sizes.h"

namespace structkv::cli {
namespace {

// Zeros for keys, values and queries, which score all tokens alike, and a saliency of ones.
class Source {
 public:
  Source(const v1::Open& open, const v1::Opened& asked)
      : open_(open), opened_(WithPulledTensors(open, asked)) {
    const std::vector<float> ones(size_t{open.prompt_tokens()} * open.geometry().kv_head_count(),
                                  1.0F);
    ones_.assign(reinterpret_cast<const char*>(ones.data()), ones.size() * sizeof(float));
    zeros_.assign(InputBytes(v1::TENSOR_KEYS) + InputBytes(v1::TENSOR_VALUES) + 4096 * 64, '\0');
  }

  client::LayerTensors Layer(const client::PivotResult* skeleton) const {
    const auto span = [&](const std::string& bytes, v1::Tensor tensor) {
      const uint64_t size = skeleton != nullptr
                                ? client::SkeletonTensorBytes(open_, opened_, tensor)
                                : InputBytes(tensor);
      return absl::Span<const std::byte>(reinterpret_cast<const std::byte*>(bytes.data()), size);
    };
    client::LayerTensors tensors;
    tensors.keys = span(zeros_, v1::TENSOR_KEYS);
    tensors.values = span(zeros_, v1::TENSOR_VALUES);
    tensors.window_queries = span(zeros_, v1::TENSOR_WINDOW_QUERIES);
    tensors.saliency = span(ones_, v1::TENSOR_SALIENCY);
    if (skeleton != nullptr) tensors.positions = skeleton->skeleton;
    return tensors;
  }

 private:
  uint64_t InputBytes(v1::Tensor tensor) const {
    return client::InputTensorBytes(open_, opened_, tensor);
  }

  const v1::Open open_;
  const v1::Opened opened_;
  std::string ones_;
  std::string zeros_;
};

TEST(BytesTableTest, CountsWhatReallyTravels) {
  const auto compressor = MakeInProcessCompressor("auto", 1);
  ASSERT_TRUE(compressor.ok());
  const auto modes = ModesOf("tiny-llama");
  ASSERT_TRUE(modes.ok());
  EXPECT_EQ(modes->size(), 7U);
  for (const Mode& mode : *modes) {
    SCOPED_TRACE(mode.name);
    v1::Open open = mode.open;
    open.set_prompt_tokens(700);
    std::optional<Source> source;
    client::SessionOptions options;
    options.on_opened = [&](const v1::Opened& opened) { source.emplace(open, opened); };
    options.on_event = [](const client::Event&) {};
    const auto layers =
        [&](uint32_t layer,
            const client::PivotResult* pivot) -> absl::StatusOr<client::LayerTensors> {
      const bool cut = mode.skeleton_rows && pivot != nullptr &&
                       layer >= pivot->skeleton_from_layer.value_or(layer + 1);
      return source->Layer(cut ? pivot : nullptr);
    };
    const auto summary = (*compressor)->RunInSteps(open, layers, options);
    ASSERT_TRUE(summary.ok()) << summary.status();
    const auto moved = MovedBytesOf(mode, 700);
    ASSERT_TRUE(moved.ok());
    EXPECT_EQ(moved->in, summary->input_bytes());
    EXPECT_EQ(moved->out, summary->output_bytes());
  }
}

TEST(BytesTableTest, IsTheOneInTheDocs) {
  const auto table = BytesTable("llama-3.1-8b");
  ASSERT_TRUE(table.ok());
  std::stringstream docs;
  docs << std::ifstream(STRUCTKV_TEST_DATA "/../../docs/protocol.md").rdbuf();
  EXPECT_THAT(docs.str(), ::testing::HasSubstr(*table))
      << "`structkv bench --bytes` prints another table";
}

}  // namespace
}  // namespace structkv::cli
