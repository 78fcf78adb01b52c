#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/transport/nccl/nccl_api.h"

namespace structkv::nccl {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

absl::StatusOr<std::shared_ptr<const Api>> LoadFake(const char* version) {
  setenv("FAKE_NCCL_VERSION", version, 1);
  auto api = Api::Load(STRUCTKV_FAKE_NCCL);
  unsetenv("FAKE_NCCL_VERSION");
  return api;
}

TEST(NcclApiTest, SaysThatThereIsNoLibrary) {
  const auto api = Api::Load("libnosuchnccl.so.2");
  EXPECT_EQ(api.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(api.status().message()),
              AllOf(HasSubstr("no NCCL"), HasSubstr("libnosuchnccl.so.2")));
}

TEST(NcclApiTest, RefusesAnotherLibrary) {
  const auto api = Api::Load("libm.so.6");
  EXPECT_EQ(api.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(api.status().message()), HasSubstr("libm.so.6 is no NCCL"));
}

TEST(NcclApiTest, RefusesVersionsOutOfRange) {
  const auto old = LoadFake("21705");
  EXPECT_EQ(old.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(old.status().message()),
              AllOf(HasSubstr("2.17.5"), HasSubstr("2.18.0 or newer")));
  const auto too_new = LoadFake("30000");
  EXPECT_EQ(too_new.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(too_new.status().message()),
              AllOf(HasSubstr("3.0.0"), HasSubstr("major version 2")));
  EXPECT_TRUE(LoadFake("21800").ok());
}

TEST(NcclApiTest, PutsErrorsInNcclsWords) {
  const auto api = LoadFake("22809");
  ASSERT_TRUE(api.ok()) << api.status();
  EXPECT_EQ((*api)->version(), 22809);
  EXPECT_TRUE((*api)->ToStatus(Result::kInProgress, "x").ok());
  const absl::Status status = (*api)->ToStatus(Result::kRemoteError, "pair 7");
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(status.message(),
            "pair 7: remote process exited or there was a network error; fake NCCL");
}

TEST(RealNcclTest, LoadsAndFailsCleanlyWithoutADriver) {
  const auto api = Api::Load();
  if (absl::IsNotFound(api.status())) GTEST_SKIP() << api.status();
  ASSERT_TRUE(api.ok()) << api.status();
  EXPECT_GE((*api)->version(), kOldestVersion);
  RecordProperty("version", VersionText((*api)->version()));
  if (access("/dev/nvidiactl", F_OK) == 0) GTEST_SKIP() << "a GPU is here: gpu_nccl_test";
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "NCCL's own threads are not instrumented";
#endif
  const Functions& call = (*api)->call();
  UniqueId id;
  ASSERT_EQ(call.get_unique_id(&id), Result::kSuccess);
  Config config;
  config.blocking = 0;
  Comm* comm = nullptr;
  Result result = call.comm_init_rank_config(&comm, 2, id, 0, &config);
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (result == Result::kInProgress && std::chrono::steady_clock::now() < limit) {
    ASSERT_NE(comm, nullptr);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ASSERT_EQ(call.comm_get_async_error(comm, &result), Result::kSuccess);
  }
  EXPECT_NE(result, Result::kSuccess);
  EXPECT_NE(result, Result::kInProgress);
  const absl::Status status = (*api)->ToStatus(result, "init", comm);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("init: "));
  if (comm != nullptr) call.comm_abort(comm);
}

}  // namespace
}  // namespace structkv::nccl
