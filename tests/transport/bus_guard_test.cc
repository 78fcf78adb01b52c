// Mapped files that lose their bytes while they are read and written.
#include "service/transport/bus_guard.h"

#include <sys/wait.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "service/transport/mapping.h"
#include "tests/transport/region_makers.h"

namespace structkv::transport {
namespace {

using testkit::SharedFile;

constexpr uint64_t kBytes = 1 << 20;

std::unique_ptr<Mapping> Map(const SharedFile& file, bool sealed = false) {
  absl::StatusOr<std::unique_ptr<Mapping>> mapping =
      Mapping::Map(Copy(file), static_cast<int64_t>(file.size()), /*writable=*/true, sealed);
  EXPECT_TRUE(mapping.ok()) << mapping.status();
  return *std::move(mapping);
}

TEST(BusGuardTest, ATruncatedFileReadsAsZeros) {
  const auto file = SharedFile::WithSeals(kBytes, 0);
  std::memset(file->data(), 7, kBytes);
  const auto mapping = Map(*file, /*sealed=*/true);  // so that the file's size is not looked at
  EXPECT_EQ(mapping->data()[kBytes - 1], std::byte{7});
  EXPECT_TRUE(mapping->Check().ok());
  ASSERT_TRUE(file->Truncate(4096));
  EXPECT_TRUE(mapping->Check().ok()) << "nothing has met it";
  EXPECT_EQ(mapping->data()[kBytes - 1], std::byte{0});
  EXPECT_EQ(mapping->data()[0], std::byte{0}) << "the whole range is replaced";
  const absl::Status status = mapping->Check();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_NE(status.message().find("1048576 bytes"), absl::string_view::npos) << status;
  mapping->data()[kBytes - 1] = std::byte{9};  // writes are taken as well
  EXPECT_EQ(file->data()[0], 7) << "and do not reach the file";
}

TEST(BusGuardTest, ASizeThatChangedIsSeenWithoutAnAccess) {
  const auto file = SharedFile::WithSeals(kBytes, 0);
  const auto mapping = Map(*file);
  ASSERT_TRUE(file->Truncate(4096));
  const absl::Status status = mapping->Check();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_NE(status.message().find("has 4096 now"), absl::string_view::npos) << status;
}

// Readers and writers of several ranges go on while all of them are truncated at once, again and
// again; other ranges stay what they are.
TEST(BusGuardTest, ManyThreadsInManyRanges) {
  const auto kept_file = SharedFile::Sealed(kBytes);
  std::memset(kept_file->data(), 5, kBytes);
  const auto kept = Map(*kept_file);
  for (int round = 0; round < 20; ++round) {
    std::vector<std::unique_ptr<SharedFile>> files;
    std::vector<std::unique_ptr<Mapping>> mappings;
    for (int i = 0; i < 4; ++i) {
      files.push_back(SharedFile::WithSeals(kBytes, 0));
      std::memset(files.back()->data(), 7, kBytes);
      mappings.push_back(Map(*files.back()));
    }
    std::atomic<bool> cut{false};
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) {
      threads.emplace_back([&, i] {
        std::byte* data = mappings[static_cast<size_t>(i) % 4]->data();
        std::vector<std::byte> copy(kBytes / 2);
        bool last = false;
        while (true) {  // once more after the cut
          last = cut.load();
          if (i < 4) {
            std::memcpy(copy.data(), data, kBytes / 2);
          } else {
            std::memset(data + kBytes / 2, i, kBytes / 2);
          }
          if (last) break;
        }
      });
    }
    for (const auto& file : files) EXPECT_TRUE(file->Truncate(0));
    cut.store(true);
    for (std::thread& thread : threads) thread.join();
    for (const auto& mapping : mappings) EXPECT_FALSE(mapping->Check().ok());
    EXPECT_TRUE(kept->Check().ok());
  }
  EXPECT_EQ(std::accumulate(kept->data(), kept->data() + kBytes, 0,
                            [](int sum, std::byte value) { return sum + (value == std::byte{5}); }),
            static_cast<int>(kBytes));
}

// What is not watched ends the process, as it would have.
TEST(BusGuardDeathTest, AnotherFaultIsNotTaken) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        const auto watched = SharedFile::WithSeals(kBytes, 0);
        const auto mapping = Map(*watched);
        const auto other = SharedFile::WithSeals(kBytes, 0);
        if (!other->Truncate(0)) std::_Exit(0);
        const volatile char* data = other->data();
        std::_Exit(data[100]);
      },
      // Sanitizers take the signal, and exit with a code of their own.
      [](int status) { return !WIFEXITED(status) || WEXITSTATUS(status) != 0; }, "");
}

TEST(BusGuardTest, PlacesAreUsedAgain) {
  const auto file = SharedFile::Sealed(4096);
  for (int i = 0; i < 3 * BusGuard::kMaxRanges; ++i) {
    absl::StatusOr<BusGuard> guard = BusGuard::Watch(file->data(), 4096);
    ASSERT_TRUE(guard.ok());
    EXPECT_FALSE(guard->hit());
  }
}

TEST(BusGuardTest, TooManyAreRefused) {
  const auto file = SharedFile::Sealed(4096);
  std::vector<BusGuard> guards;
  absl::Status status;
  while (status.ok()) {
    absl::StatusOr<BusGuard> guard = BusGuard::Watch(file->data(), 4096);
    status = guard.status();
    if (guard.ok()) guards.push_back(*std::move(guard));
  }
  EXPECT_EQ(guards.size(), static_cast<size_t>(BusGuard::kMaxRanges));
  EXPECT_TRUE(absl::IsResourceExhausted(status));
}

}  // namespace
}  // namespace structkv::transport
