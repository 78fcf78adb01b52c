#include "service/admin/recent.h"

#include <string>

#include "gtest/gtest.h"

namespace structkv::admin {
namespace {

TEST(RecentTest, KeepsTheNewest) {
  Recent recent;
  for (size_t i = 0; i < Recent::kErrors + 10; ++i) {
    rpc::PromptReport prompt;
    prompt.id = std::to_string(i);
    prompt.answered = 1;
    recent.Add(prompt, absl::AbortedError("why " + prompt.id));
  }
  const std::string last = std::to_string(Recent::kErrors + 9);
  ASSERT_EQ(recent.prompts().size(), Recent::kPrompts);
  EXPECT_EQ(recent.prompts()[0].report.id, last);
  ASSERT_EQ(recent.errors().size(), Recent::kErrors);
  EXPECT_EQ(recent.errors()[0].what, "prompt " + last);
  EXPECT_EQ(recent.errors()[0].status, absl::AbortedError("why " + last));
}

TEST(RecentTest, WhatIsKeptOfWhat) {
  Recent recent;
  recent.Add(rpc::PromptReport{}, absl::InvalidArgumentError("refused"));
  recent.Add(rpc::FetchReport{}, absl::NotFoundError("no such cache"));
  recent.Add(rpc::FetchReport{}, absl::OkStatus());
  rpc::PromptReport good;
  good.id = "good";
  good.answered = 4;
  recent.Add(good, absl::OkStatus());
  ASSERT_EQ(recent.prompts().size(), 1U);
  EXPECT_EQ(recent.prompts()[0].report.id, "good");
  ASSERT_EQ(recent.errors().size(), 2U);
  EXPECT_EQ(recent.errors()[0].what, "a fetch");
  EXPECT_EQ(recent.errors()[1].what, "a prompt at open");
}

}  // namespace
}  // namespace structkv::admin
