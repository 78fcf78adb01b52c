// Ranges of regions: where they may lie, and where results go.
#include "service/transport/shared_memory.h"

#include <cstdint>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/transport/region_transport.h"
#include "tests/transport/region_makers.h"

namespace structkv::transport {
namespace {

using ::testing::HasSubstr;
using testkit::SharedFile;

constexpr uint64_t kBytes = 64 << 10;

class SharedMemoryTest : public ::testing::Test {
 protected:
  SharedMemoryTest() : file_(SharedFile::Sealed(kBytes)), other_(SharedFile::Sealed(kBytes)) {
    request_.tenant = "name:a";
    request_.regions = {registry_.AddDescriptor(Copy(*file_), Wanted(*file_))->handle,
                        registry_.AddDescriptor(Copy(*other_), Wanted(*other_, false))->handle};
  }

  std::shared_ptr<const Transport> Granted() {
    auto granted = GrantSharedMemory(registry_, request_, sizes_);
    EXPECT_TRUE(granted.ok()) << granted.status();
    return granted.value_or(InlineTransport());
  }

  void ExpectRefused(absl::StatusCode code, const std::string& text) {
    const absl::Status status = GrantSharedMemory(registry_, request_, sizes_).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }

  RegionRegistry registry_{RegionOptions{}};
  std::unique_ptr<SharedFile> file_;
  std::unique_ptr<SharedFile> other_;
  TransportRequest request_;
  PromptSizes sizes_{.layers = 3, .key_bytes = 1000, .value_bytes = 500};
};

TEST_F(SharedMemoryTest, RangesLieInTheirRegion) {
  const auto transport = Granted();
  EXPECT_EQ(transport->kind(), Kind::kSharedMemory);
  for (const RegionRange& range :
       {RegionRange{0, 0, kBytes}, RegionRange{1, kBytes - 1, 1}, RegionRange{0, 64, 100}}) {
    const auto buffer = transport->Resolve(range);
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    EXPECT_EQ(buffer->size(), range.size_bytes);
    EXPECT_TRUE(buffer->is_lent());
  }
  for (const RegionRange& range : {
           RegionRange{2, 0, 1},
           RegionRange{UINT32_MAX, 0, 1},
           RegionRange{0, 0, 0},
           RegionRange{0, kBytes, 1},
           RegionRange{0, 1, kBytes},
           RegionRange{0, UINT64_MAX, 1},
           RegionRange{0, UINT64_MAX, UINT64_MAX},
           RegionRange{0, UINT64_MAX - 63, 64},  // the sum wraps to 0
           RegionRange{0, 64, UINT64_MAX - 63},
           RegionRange{0, 0, uint64_t{1} << 63},
       }) {
    EXPECT_TRUE(absl::IsInvalidArgument(transport->Resolve(range).status()));
    EXPECT_TRUE(absl::IsInvalidArgument(transport->ResolveInPlace(range).status()));
  }
}

TEST_F(SharedMemoryTest, WhatIsReadInPlaceIsAlignedAndApartFromResults) {
  request_.results = {0, 1024, 3 * (1024 + 512)};
  const auto transport = Granted();
  EXPECT_TRUE(transport->ResolveInPlace({0, 0, 1024}).ok());
  EXPECT_TRUE(transport->ResolveInPlace({0, 1024 + 3 * 1536, 64}).ok());
  EXPECT_TRUE(transport->ResolveInPlace({1, 1024, 64}).ok()) << "another region";
  EXPECT_TRUE(transport->Resolve({0, 1023, 100}).ok()) << "it is copied";
  const absl::Status odd = transport->ResolveInPlace({0, 32, 64}).status();
  EXPECT_THAT(std::string(odd.message()), HasSubstr("range.offset_bytes is 32; a multiple of 64"));
  for (const RegionRange& range : {RegionRange{0, 960, 65}, RegionRange{0, 1024, 1},
                                   RegionRange{0, 0, kBytes}, RegionRange{0, 2048, 64}}) {
    const absl::Status overlap = transport->ResolveInPlace(range).status();
    EXPECT_THAT(std::string(overlap.message()), HasSubstr("overlaps open.result_range"));
  }
}

TEST_F(SharedMemoryTest, ResultsHaveFixedPlaces) {
  EXPECT_EQ(ResultStride(sizes_), 1024U + 512U);
  request_.results = {0, 128, 3 * 1536};
  const auto transport = Granted();
  const ResultPlace place = transport->result_place();
  for (int64_t layer = 0; layer < 3; ++layer) {
    engine::LayerInput input;
    input.layer = layer;
    transport->GiveRoom(&input);
    const auto at = static_cast<uint64_t>(128 + layer * 1536);
    EXPECT_EQ(place.SourceOf(0, input.key_room.span()), ResultSource(RegionRange{0, at, 1000}));
    EXPECT_EQ(place.SourceOf(0, input.value_room.span()),
              ResultSource(RegionRange{0, at + 1024, 500}));
    *input.key_room.data() = std::byte{9};
    EXPECT_EQ(file_->data()[at], 9);
  }
  const std::byte elsewhere{};
  EXPECT_EQ(place.SourceOf(0, {&elsewhere, 1}), ResultSource());
}

TEST_F(SharedMemoryTest, ResultsThatDoNotFitAreRefused) {
  request_.results = {0, 128, 3 * 1536 - 1};
  ExpectRefused(absl::StatusCode::kInvalidArgument,
                "size_bytes is 4607; 3 layers of 1536 bytes are needed");
  request_.results = {0, 32, 3 * 1536};
  ExpectRefused(absl::StatusCode::kInvalidArgument, "a multiple of 64");
  request_.results = {1, 0, 3 * 1536};
  ExpectRefused(absl::StatusCode::kInvalidArgument, "not registered as writable");
  request_.results = {2, 0, 3 * 1536};
  ExpectRefused(absl::StatusCode::kInvalidArgument, "range.region is 2");
  request_.results = {0, UINT64_MAX - 63, 3 * 1536};
  ExpectRefused(absl::StatusCode::kInvalidArgument, "region 0 has 65536 bytes");
  request_.results = {0, 0, 3 * 1536};
  sizes_ = {.layers = 3};
  ExpectRefused(absl::StatusCode::kInvalidArgument, "the output is a plan");
  sizes_ = {.layers = 1 << 20, .key_bytes = int64_t{1} << 62, .value_bytes = int64_t{1} << 62};
  ExpectRefused(absl::StatusCode::kInvalidArgument, "layers of 9223372036854775808 bytes");
}

TEST_F(SharedMemoryTest, RegionsAreUsedAsLongAsAnythingOfThem) {
  auto transport = Granted();
  const std::string handle = request_.regions[0];
  EXPECT_EQ(registry_.Get(handle, "name:a")->uses, 1);
  absl::StatusOr<engine::Buffer> buffer = transport->Resolve({0, 0, 64});
  transport.reset();
  EXPECT_EQ(registry_.Get(handle, "name:a")->uses, 1) << "the buffer holds it";
  buffer->Reset();
  EXPECT_EQ(registry_.Get(handle, "name:a")->uses, 0);
}

TEST_F(SharedMemoryTest, RegionsThatCannotBeUsed) {
  const std::string handle = request_.regions[0];
  request_.regions = {};
  ExpectRefused(absl::StatusCode::kFailedPrecondition, "names none");
  request_.regions = {handle, handle};
  ExpectRefused(absl::StatusCode::kInvalidArgument, "comes twice");
  request_.regions = {handle, "none"};
  ExpectRefused(absl::StatusCode::kNotFound, "open.regions[1]");
  request_.regions.assign(kMaxPromptRegions + 1, handle);
  ExpectRefused(absl::StatusCode::kInvalidArgument, "at most 64");
  EXPECT_EQ(registry_.Get(handle, "name:a")->uses, 0) << "a refusal holds nothing";
}

}  // namespace
}  // namespace structkv::transport
