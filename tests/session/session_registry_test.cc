#include "service/session/session_registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>

namespace structkv::session {
namespace {

using Added = SessionRegistry::Added;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

// The registry keeps sessions and never looks into them: a share of anything does.
std::shared_ptr<SessionCore> FakeCore() {
  const auto something = std::make_shared<int>(0);
  return {something, reinterpret_cast<SessionCore*>(something.get())};
}

TEST(SessionRegistryTest, AddsUpToTheLimit) {
  SessionRegistry registry;
  const auto a = FakeCore();
  const auto b = FakeCore();
  EXPECT_EQ(registry.Add("a", "", a, 2), Added::kYes);
  EXPECT_EQ(registry.Add("b", "", b, 2), Added::kYes);
  EXPECT_EQ(registry.Add("c", "", FakeCore(), 2), Added::kFull);
  EXPECT_EQ(registry.size(), 2);
  EXPECT_THAT(registry.All(), UnorderedElementsAre(a, b));
  registry.Remove("a");
  registry.Remove("a");
  registry.Remove("nobody");
  EXPECT_EQ(registry.Add("c", "", a, 2), Added::kYes);
}

TEST(SessionRegistryTest, FindsByKey) {
  SessionRegistry registry;
  const auto a = FakeCore();
  const auto b = FakeCore();
  EXPECT_EQ(registry.FindKey("key"), nullptr);
  EXPECT_EQ(registry.Add("a", "key", a, 9), Added::kYes);
  EXPECT_EQ(registry.Add("b", "key", b, 9), Added::kKeyTaken);
  EXPECT_EQ(registry.size(), 1);
  EXPECT_EQ(registry.FindKey("key"), a);
  EXPECT_EQ(registry.FindKey(""), nullptr);
  registry.Remove("a");
  EXPECT_EQ(registry.FindKey("key"), nullptr);
  EXPECT_EQ(registry.Add("b", "key", b, 9), Added::kYes);
}

TEST(SessionRegistryTest, AnEmptyKeyIsNone) {
  SessionRegistry registry;
  const auto a = FakeCore();
  EXPECT_EQ(registry.Add("a", "", a, 9), Added::kYes);
  EXPECT_EQ(registry.Add("b", "", a, 9), Added::kYes);
  EXPECT_EQ(registry.FindKey(""), nullptr);
}

// The old session still counts while its memory is on its way back, but its key is free.
TEST(SessionRegistryTest, AForgottenKeyBelongsToTheNext) {
  SessionRegistry registry;
  const auto a = FakeCore();
  const auto b = FakeCore();
  ASSERT_EQ(registry.Add("a", "key", a, 9), Added::kYes);
  registry.ForgetKey("a");
  registry.ForgetKey("nobody");
  EXPECT_EQ(registry.size(), 1);
  ASSERT_EQ(registry.Add("b", "key", b, 9), Added::kYes);
  registry.ForgetKey("a");
  registry.Remove("a");
  EXPECT_EQ(registry.FindKey("key"), b);
}

TEST(SessionRegistryTest, KeepsNoSessionAlive) {
  SessionRegistry registry;
  auto a = FakeCore();
  const std::weak_ptr<SessionCore> weak = a;
  ASSERT_EQ(registry.Add("a", "key", a, 9), Added::kYes);
  a.reset();
  EXPECT_TRUE(weak.expired());
  EXPECT_EQ(registry.FindKey("key"), nullptr);
  EXPECT_THAT(registry.All(), IsEmpty());
  EXPECT_EQ(registry.size(), 1);  // until it says itself that it is gone
}

TEST(SessionRegistryTest, DrainingAddsNobody) {
  SessionRegistry registry;
  const auto a = FakeCore();
  ASSERT_EQ(registry.Add("a", "key", a, 1), Added::kYes);
  EXPECT_FALSE(registry.draining());
  registry.StartDraining();
  EXPECT_TRUE(registry.draining());
  EXPECT_EQ(registry.Add("b", "key", a, 1), Added::kDraining);
  EXPECT_EQ(registry.FindKey("key"), a);
}

TEST(SessionRegistryTest, WaitsForTheEnd) {
  SessionRegistry registry;
  const auto a = FakeCore();
  EXPECT_TRUE(registry.WaitEmpty(absl::ZeroDuration()));
  EXPECT_TRUE(registry.WaitRemoved("a", -absl::InfiniteDuration()));
  ASSERT_EQ(registry.Add("a", "", a, 9), Added::kYes);
  ASSERT_EQ(registry.Add("b", "", a, 9), Added::kYes);
  EXPECT_FALSE(registry.WaitEmpty(absl::Milliseconds(1)));
  EXPECT_FALSE(registry.WaitRemoved("a", -absl::Seconds(1)));
  std::thread thread([&] {
    registry.Remove("a");
    registry.Remove("b");
  });
  EXPECT_TRUE(registry.WaitRemoved("a", absl::InfiniteDuration()));
  EXPECT_TRUE(registry.WaitEmpty(absl::InfiniteDuration()));
  thread.join();
}

}  // namespace
}  // namespace structkv::session
