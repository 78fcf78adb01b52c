// Held caches by the client library, against a real server: fetched like an inline answer, over
// connections that break, and kept alive by heartbeats.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/e2e/client_prompt.h"
#include "tests/e2e/held_test.h"
#include "tests/testing/cutting_proxy.h"
#include "tests/testing/process.h"

namespace structkv::testkit {
namespace {

class ClientHeldTest : public HeldTest {
 protected:
  absl::StatusOr<client::Compressed> Compress(client::Client& client, const PromptData& data,
                                              const v1::Open& open) {
    return client::CompressPrompt(client, open, [&](uint32_t layer) {
      return absl::StatusOr<client::LayerTensors>(TensorsOf(data, layer));
    });
  }
  // Keys, values and positions of all layers.
  static std::string RowsOf(const std::vector<client::LayerResult>& layers) {
    std::string text;
    for (const client::LayerResult& layer : layers) {
      text += std::to_string(layer.layer) + AsText(layer.positions) + AsText(layer.keys) +
              AsText(layer.values);
    }
    return text;
  }
};

TEST_F(ClientHeldTest, FetchesWhatAnInlineAnswerHas) {
  Start(HoldOptions());
  const v1::Open open = WideOpen();
  const PromptData data(open, 21);
  const auto client = *client::Client::Connect(target());
  const auto whole = Compress(*client, data, open);
  ASSERT_TRUE(whole.ok()) << whole.status();
  const auto held = Compress(*client, data, Held(open));
  ASSERT_TRUE(held.ok()) << held.status();
  for (const client::LayerResult& layer : held->layers) {
    EXPECT_TRUE(layer.keys.empty());
    EXPECT_FALSE(layer.positions.empty());
  }
  const std::string handle = held->summary.held().handle();
  const auto fetched = client->FetchCache(handle);
  ASSERT_TRUE(fetched.ok()) << fetched.status();
  EXPECT_TRUE(RowsOf(fetched->layers) == RowsOf(whole->layers));
  EXPECT_EQ(fetched->attempts, 1);

  client::FetchOptions options;
  options.first_layer = 1;
  options.layer_count = 2;
  options.first_kv_head = 2;
  options.kv_head_count = 1;
  options.checksums = true;
  std::vector<client::LayerResult> layers;
  options.on_layer = [&](client::LayerResult layer) { layers.push_back(std::move(layer)); };
  const auto part = client->FetchCache(handle, options);
  ASSERT_TRUE(part.ok()) << part.status();
  EXPECT_TRUE(part->layers.empty());
  ASSERT_EQ(layers.size(), 2U);
  v1::HeadRange range;
  range.set_begin(2);
  range.set_count(1);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(layers[i].layer, i + 1);
    EXPECT_TRUE(AsText(layers[i].keys) ==
                SliceHeads(AsText(whole->layers[i + 1].keys), 1, 4, range));
  }
  EXPECT_TRUE(client->ReleaseCache(handle).ok());
  EXPECT_TRUE(absl::IsNotFound(client->FetchCache(handle).status()));
  EXPECT_TRUE(absl::IsNotFound(client->ReleaseCache(handle)));
}

TEST_F(ClientHeldTest, ABrokenConnectionIsGoneOnWith) {
  Start(HoldOptions());
  v1::Open open = WideOpen(4096);
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  open.mutable_method()->mutable_full();
  const PromptData data(open, 21);
  const auto direct = *client::Client::Connect(target());
  const auto held = Compress(*direct, data, Held(open));
  ASSERT_TRUE(held.ok()) << held.status();
  const std::string handle = held->summary.held().handle();
  for (const uint32_t heads : {4U, 3U}) {
    client::FetchOptions options;
    options.kv_head_count = heads;
    options.max_message_bytes = 64 << 10;
    options.retry.initial_backoff = absl::Milliseconds(1);
    const auto expected = direct->FetchCache(handle, options);
    ASSERT_TRUE(expected.ok()) << expected.status();
    CuttingProxy proxy(server().port(), {300'000, 1'000'000, 2'500'000});
    const auto client = *client::Client::Connect(proxy.target());
    const auto fetched = client->FetchCache(handle, options);
    ASSERT_TRUE(fetched.ok()) << fetched.status();
    EXPECT_GE(fetched->attempts, 4);
    EXPECT_EQ(proxy.connections(), 4);
    EXPECT_TRUE(RowsOf(fetched->layers) == RowsOf(expected->layers));
  }
  EXPECT_TRUE(direct->ReleaseCache(handle).ok());
  EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
}

TEST_F(ClientHeldTest, AHeartbeatKeepsACacheAlive) {
  Start(HoldOptions());
  v1::Open open = Held(WideOpen());
  open.mutable_hold()->set_lease_millis(400);
  const auto client = *client::Client::Connect(target());
  const auto held = Compress(*client, PromptData(open, 1), open);
  ASSERT_TRUE(held.ok()) << held.status();
  const std::string handle = held->summary.held().handle();
  {
    const client::CacheLease lease(client.get(), handle, absl::Milliseconds(400));
    EXPECT_TRUE(Eventually([&] { return lease.renewals() >= 6; }));
    EXPECT_TRUE(lease.status().ok()) << lease.status();
    EXPECT_TRUE(client->FetchCache(handle).ok());
  }
  EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
  const client::CacheLease late(client.get(), handle, absl::Milliseconds(30));
  EXPECT_TRUE(Eventually([&] { return absl::IsNotFound(late.status()); }));
  EXPECT_EQ(late.renewals(), 0);
}

TEST_F(ClientHeldTest, RenewsForAnotherTimeAndAnotherTenantCannot) {
  Start(HoldOptions());
  const v1::Open open = Held(WideOpen());
  const auto client = *client::Client::Connect(target());
  const auto held = Compress(*client, PromptData(open, 1), open);
  ASSERT_TRUE(held.ok()) << held.status();
  const std::string handle = held->summary.held().handle();
  EXPECT_EQ(*client->RenewCache(handle), absl::Seconds(60));
  EXPECT_EQ(*client->RenewCache(handle, absl::Seconds(90)), absl::Seconds(90));
  EXPECT_TRUE(absl::IsInvalidArgument(client->RenewCache(handle, absl::Hours(1)).status()));
  client::HeldCallOptions other;
  other.metadata = {{"structkv-tenant", "other"}};
  EXPECT_TRUE(absl::IsNotFound(client->RenewCache(handle, std::nullopt, other).status()));
  EXPECT_TRUE(absl::IsNotFound(client->ReleaseCache(handle, other)));
  EXPECT_TRUE(client->ReleaseCache(handle).ok());
}

}  // namespace
}  // namespace structkv::testkit
