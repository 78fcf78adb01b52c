// Descriptors and names that may become regions, and those that may not.
#include "service/transport/region_files.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/process.h"
#include "tests/transport/region_makers.h"

namespace structkv::transport {
namespace {

using ::testing::HasSubstr;
using testkit::SharedFile;

std::string UniqueName(const std::string& name) {
  return kRegionPrefix + name + "-" + std::to_string(getpid());
}

void ExpectRefused(const absl::Status& status, absl::StatusCode code, const std::string& text) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(text));
}

TEST(CheckDescriptorTest, NeedsTheSealAndTheSize) {
  const auto sealed = SharedFile::Sealed(8192);
  EXPECT_TRUE(CheckDescriptor(sealed->fd(), 8192).ok());
  EXPECT_TRUE(CheckDescriptor(sealed->fd(), 1).ok());
  ExpectRefused(CheckDescriptor(sealed->fd(), 8193), absl::StatusCode::kInvalidArgument,
                "size_bytes is 8193; the file has 8192 bytes");
  for (const int seals : {0, F_SEAL_GROW, F_SEAL_SEAL}) {
    ExpectRefused(CheckDescriptor(SharedFile::WithSeals(8192, seals)->fd(), 1),
                  absl::StatusCode::kFailedPrecondition, "F_SEAL_SHRINK");
  }
}

TEST(CheckDescriptorTest, HugePagesAreTakenWhole) {
  constexpr int64_t kHugePage = 2 << 20;
  const FileDescriptor file(
      memfd_create("structkv-test", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB | MFD_HUGE_2MB));
  if (!file.valid() || ftruncate(file.get(), 2 * kHugePage) != 0) GTEST_SKIP() << "no huge pages";
  ASSERT_EQ(fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  EXPECT_TRUE(CheckDescriptor(file.get(), 2 * kHugePage).ok());
  ExpectRefused(CheckDescriptor(file.get(), kHugePage + 4096), absl::StatusCode::kInvalidArgument,
                "multiples of 2097152 bytes are allowed");
}

TEST(CheckDescriptorTest, TakesNothingButFilesOfATmpfs) {
  const testkit::TemporaryDirectory directory;
  int pipes[2];
  ASSERT_EQ(pipe(pipes), 0);
  const FileDescriptor read_end(pipes[0]);
  const FileDescriptor write_end(pipes[1]);
  const FileDescriptor null(open("/dev/null", O_RDWR | O_CLOEXEC));
  for (const int fd : {read_end.get(), null.get()}) {
    ExpectRefused(CheckDescriptor(fd, 1), absl::StatusCode::kInvalidArgument, "can be sealed");
  }
}

TEST(OpenNamedTest, TakesNamesOfRegionsAlone) {
  const std::string slash = std::string(kRegionPrefix) + "a/b";
  const std::string up = std::string(kRegionPrefix) + "/../x";
  const std::string nul("structkv.a\0b", 12);
  const std::string too_long = kRegionPrefix + std::string(kMaxRegionNameBytes + 1, 'a');
  for (const std::string& name :
       {std::string(), std::string("x"), std::string(kRegionPrefix), slash, up, nul, too_long,
        std::string("sem.structkv.a"), std::string("structkv.\xff")}) {
    ExpectRefused(OpenNamed(kRegionDirectory, name, 1, true).status(),
                  absl::StatusCode::kInvalidArgument, "letters, digits");
  }
}

TEST(OpenNamedTest, FindsTheFile) {
  const std::string name = UniqueName("open");
  ExpectRefused(OpenNamed(kRegionDirectory, name, 1, true).status(), absl::StatusCode::kNotFound,
                name);
  const auto file = SharedFile::Named(name, 8192);
  const absl::StatusOr<NamedFile> opened = OpenNamed(kRegionDirectory, name, 8192, true);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->owner, static_cast<int64_t>(getuid()));
  ExpectRefused(OpenNamed(kRegionDirectory, name, 8193, true).status(),
                absl::StatusCode::kInvalidArgument, "the file has 8192 bytes");
  EXPECT_TRUE(RemoveName(kRegionDirectory, name, opened->file.get()).ok());
  EXPECT_FALSE(file->HasName());
  EXPECT_TRUE(RemoveName(kRegionDirectory, name, opened->file.get()).ok()) << "it is gone";
}

TEST(OpenNamedTest, FollowsNoLinkAndTakesRegularFilesOfATmpfsAlone) {
  const std::string link = UniqueName("link");
  const std::string path = std::string(kRegionDirectory) + "/" + link;
  ASSERT_EQ(symlink("/etc/passwd", path.c_str()), 0);
  EXPECT_EQ(OpenNamed(kRegionDirectory, link, 1, false).status().code(),
            absl::StatusCode::kInvalidArgument);
  unlink(path.c_str());
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  ExpectRefused(OpenNamed(kRegionDirectory, link, 1, false).status(),
                absl::StatusCode::kInvalidArgument, "no regular file of a tmpfs");
  unlink(path.c_str());
}

// Only what nobody holds goes, and only what is old enough.
TEST(SweepNamesTest, RemovesWhatCreatorsLeftBehind) {
  const auto held = SharedFile::Named(UniqueName("held"), 4096);
  const std::string path = std::string(kRegionDirectory) + "/" + UniqueName("left");
  const FileDescriptor left(open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600));
  const std::string other = std::string(kRegionDirectory) + "/other-" + std::to_string(getpid());
  const FileDescriptor foreign(open(other.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600));
  ASSERT_TRUE(left.valid() && foreign.valid());
  SweepNames(kRegionDirectory, absl::Minutes(5));
  EXPECT_EQ(access(path.c_str(), F_OK), 0) << "it is too young";
  usleep(20'000);
  SweepNames(kRegionDirectory, absl::Milliseconds(10));
  EXPECT_NE(access(path.c_str(), F_OK), 0);
  EXPECT_TRUE(held->HasName());
  EXPECT_EQ(access(other.c_str(), F_OK), 0) << "it is no region's";
  unlink(other.c_str());
}

}  // namespace
}  // namespace structkv::transport
