// Held caches that the client library fetches into shared memory, from a real server: what comes in
// messages, to the byte, in the arena that it was given.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/arena.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/e2e/client_prompt.h"
#include "tests/e2e/held_test.h"
#include "tests/e2e/held_ways.h"
#include "tests/testing/cutting_proxy.h"
#include "tests/testing/process.h"

namespace structkv::testkit {
namespace {

class ClientHeldRegionTest : public HeldTest {
 protected:
  void StartHere() {
    ServerOptions options = HoldOptions();
    options.regions.socket.path = directory_.Path("regions");
    Start(options);
    client_ = *client::Client::Connect(target());
  }
  std::string HandleOf(const PromptData& data) { return Hold(data).summary->held().handle(); }
  static std::string RowsOf(const std::vector<client::LayerResult>& layers) {
    std::string text;
    for (const client::LayerResult& layer : layers) {
      text += std::to_string(layer.layer) + AsText(layer.positions) + AsText(layer.keys) +
              AsText(layer.values) + AsText(layer.key_scales) + AsText(layer.value_scales);
    }
    return text;
  }
  static client::FetchOptions InMessages(client::FetchOptions options) {
    options.transport = client::TransportChoice::kInline;
    return options;
  }
  static bool LiesIn(const client::Arena& arena, const client::Bytes& bytes) {
    return bytes.empty() || arena.region()->OffsetOf(bytes.span()).has_value();
  }

  TemporaryDirectory directory_;
  std::unique_ptr<client::Client> client_;
};

class ClientHeldWaysTest : public ClientHeldRegionTest,
                           public ::testing::WithParamInterface<HeldParam> {};

TEST_P(ClientHeldWaysTest, FetchesIntoAnArenaByItself) {
  StartHere();
  const v1::Open open = HeldOpen(GetParam());
  const std::string handle = HandleOf(PromptData(open, 31));
  const auto arena =
      std::make_shared<client::Arena>(*client::Region::Create({.size_bytes = 4 << 20}));
  client::FetchOptions options;
  options.results = arena;
  options.first_layer = 1;
  for (const uint32_t first_head : {0U, open.geometry().kv_head_count() - 1}) {
    options.first_kv_head = first_head;
    const auto expected = client_->FetchCache(handle, InMessages(options));
    ASSERT_TRUE(expected.ok()) << expected.status();
    EXPECT_EQ(expected->info.transport(), v1::TRANSPORT_INLINE);
    EXPECT_FALSE(LiesIn(*arena, expected->layers[0].keys));
    const auto fetched = client_->FetchCache(handle, options);
    ASSERT_TRUE(fetched.ok()) << fetched.status();
    EXPECT_EQ(fetched->info.transport(), v1::TRANSPORT_SHARED_MEMORY)
        << fetched->info.transport_reason();
    EXPECT_TRUE(RowsOf(fetched->layers) == RowsOf(expected->layers));
    for (const client::LayerResult& layer : fetched->layers) {
      EXPECT_TRUE(LiesIn(*arena, layer.keys) && LiesIn(*arena, layer.values));
    }
    const auto described = client_->DescribeCache(handle, options);
    ASSERT_TRUE(described.ok()) << described.status();
    EXPECT_EQ(client::FetchResultBytes(*described), client::FetchResultBytes(fetched->info));
    EXPECT_EQ(arena->region()->size() - arena->free_bytes(), client::FetchResultBytes(*described));
  }
  EXPECT_EQ(arena->free_bytes(), arena->region()->size());
  EXPECT_TRUE(client_->ReleaseCache(handle).ok());
}

INSTANTIATE_TEST_SUITE_P(, ClientHeldWaysTest, HeldGrid(), HeldName);

// The library answers pulls of prompts that are held, in messages and from staging.
TEST_F(ClientHeldRegionTest, PulledRowsAreHeld) {
  StartHere();
  const PromptData data(WideOpen(), 9);
  const std::string plain = HandleOf(data);
  const auto expected = client_->FetchCache(plain);
  ASSERT_TRUE(expected.ok()) << expected.status();
  v1::Open open = Held(data.open());
  open.set_pull(v1::PULL_VALUES);
  for (const bool shared : {false, true}) {
    client::SessionOptions options;
    if (shared) {
      options.transport = client::TransportChoice::kSharedMemory;
      options.staging =
          std::make_shared<client::Arena>(*client::Region::Create({.size_bytes = 4 << 20}));
    }
    const auto held = client::CompressPrompt(
        *client_, open,
        [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
          return TensorsOf(data, layer);
        },
        options);
    ASSERT_TRUE(held.ok()) << held.status();
    EXPECT_EQ(held->summary.transport(), shared ? "shared_memory" : "inline");
    const std::string handle = held->summary.held().handle();
    const auto fetched = client_->FetchCache(handle);
    ASSERT_TRUE(fetched.ok()) << fetched.status();
    EXPECT_TRUE(RowsOf(fetched->layers) == RowsOf(expected->layers));
    EXPECT_TRUE(client_->ReleaseCache(handle).ok());
  }
  EXPECT_TRUE(client_->ReleaseCache(plain).ok());
}

TEST_F(ClientHeldRegionTest, ABrokenConnectionIsGoneOnWith) {
  StartHere();
  v1::Open open = WideOpen(4096);
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  open.mutable_method()->mutable_full();
  const std::string handle = HandleOf(PromptData(open, 21));
  const auto arena =
      std::make_shared<client::Arena>(*client::Region::Create({.size_bytes = 64 << 20}));
  client::FetchOptions options;
  options.kv_head_count = 3;
  options.max_message_bytes = 64 << 10;
  options.retry.initial_backoff = absl::Milliseconds(1);
  const auto expected = client_->FetchCache(handle, InMessages(options));
  ASSERT_TRUE(expected.ok()) << expected.status();
  options.results = arena;
  // They stay: the server is asked about rooms on the connection that they were offered on.
  CuttingProxy proxy(server().port(), {9'000, 30'000});
  const auto client = *client::Client::Connect(proxy.target());
  {
    const auto fetched = client->FetchCache(handle, options);
    ASSERT_TRUE(fetched.ok()) << fetched.status();
    EXPECT_GE(fetched->attempts, 2);
    EXPECT_EQ(fetched->info.transport(), v1::TRANSPORT_SHARED_MEMORY)
        << fetched->info.transport_reason();
    EXPECT_TRUE(RowsOf(fetched->layers) == RowsOf(expected->layers));
  }
  // The room that broken streams might still have written to comes back once none does.
  EXPECT_TRUE(Eventually([&] {
    const auto again = client_->FetchCache(handle, options);
    return again.ok() &&
           arena->region()->size() - arena->free_bytes() == client::FetchResultBytes(again->info);
  }));
  EXPECT_TRUE(client_->ReleaseCache(handle).ok());
}

}  // namespace
}  // namespace structkv::testkit
