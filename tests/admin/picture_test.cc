#include <numeric>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "service/rpc/prompt_picture.h"

namespace structkv::rpc {
namespace {

engine::LayerOutput Output(int64_t layer, std::vector<int32_t> positions, int64_t heads = 1) {
  engine::LayerOutput output;
  output.layer = layer;
  output.kept_tokens = static_cast<int64_t>(positions.size()) / heads;
  output.positions = std::move(positions);
  return output;
}

TEST(PromptPictureTest, SharesOfStretches) {
  PromptPicture picture(256);  // stretches of 2 tokens
  picture.Add(Output(1, {0, 1, 2, 255}));
  const PromptPicture::View view = picture.view();
  const PromptPicture::Layer& layer = view.layers.at(1);
  EXPECT_EQ(layer.kept[0], 255);
  EXPECT_EQ(layer.kept[1], 127);
  EXPECT_EQ(layer.kept[2], 0);
  EXPECT_EQ(layer.kept[127], 127);
  EXPECT_EQ(layer.kept_tokens, 4);
  EXPECT_DOUBLE_EQ(view.kept_share, 4.0 / 256);
}

TEST(PromptPictureTest, HeadsTogether) {
  PromptPicture picture(128);
  picture.Add(Output(0, {0, 1, 0, 127}, /*heads=*/2));
  const PromptPicture::Layer layer = picture.view().layers.at(0);
  EXPECT_EQ(layer.kept[0], 255);
  EXPECT_EQ(layer.kept[1], 127);
  EXPECT_EQ(layer.kept[127], 127);
}

// All tokens kept is all stretches full, whatever the length; a short prompt leaves some empty.
TEST(PromptPictureTest, AnyLength) {
  for (int32_t tokens : {1, 5, 127, 128, 129, 1000, 100'003}) {
    PromptPicture picture(tokens);
    std::vector<int32_t> all(tokens);
    std::iota(all.begin(), all.end(), 0);
    picture.Add(Output(0, all));
    const PromptPicture::View view = picture.view();
    EXPECT_DOUBLE_EQ(view.kept_share, 1);
    int full = 0;
    for (const uint8_t share : view.layers.at(0).kept) {
      EXPECT_TRUE(share == 0 || share == 255);
      full += share == 255 ? 1 : 0;
    }
    EXPECT_EQ(full, std::min<int64_t>(tokens, PromptPicture::kStretches)) << tokens;
  }
}

TEST(PromptPictureTest, ThePivotAndItsScoresComeBeforeOrAfterTheirLayers) {
  PromptPicture picture(100);
  picture.Add(Output(0, {1, 2}));
  engine::PivotResult pivot;
  pivot.decision.pivot_layer = 1;
  pivot.decision.decided_at_layer = 2;
  pivot.decision.layers = {{.layer = 0, .metrics = {}, .transition = {}},
                           {.layer = 1, .metrics = {}, .transition = 0.5},
                           {.layer = 2, .metrics = {}, .transition = 0.25}};
  pivot.skeleton = {1, 2, 3};
  picture.Add(pivot);
  EXPECT_DOUBLE_EQ(picture.view().kept_share, 2.0 / 100);  // of the layer that was answered
  picture.Add(Output(1, {1, 2, 3, 4}));
  const PromptPicture::View view = picture.view();
  ASSERT_TRUE(view.pivot.has_value());
  EXPECT_EQ(view.pivot->layer, 1);
  EXPECT_EQ(view.pivot->decided_at_layer, 2);
  EXPECT_EQ(view.pivot->skeleton_tokens, 3);
  EXPECT_EQ(view.layers.at(0).transition, std::nullopt);
  EXPECT_EQ(view.layers.at(1).transition, 0.5);
  EXPECT_EQ(view.layers.at(2).transition, 0.25);
  EXPECT_DOUBLE_EQ(view.kept_share, 6.0 / 200);
}

}  // namespace
}  // namespace structkv::rpc
