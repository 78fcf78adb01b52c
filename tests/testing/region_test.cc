#include "tests/testing/region_test.h"

#include <utility>

#include "gmock/gmock.h"

namespace structkv::testkit {

RegionTest::~RegionTest() {
  ExpectUndisturbed();
  connection_.reset();
  if (!running() || server().regions() == nullptr) return;
  EXPECT_TRUE(Eventually([&] { return mapped_bytes() == 0; })) << mapped_bytes();
}

ServerOptions RegionTest::Options() {
  ServerOptions options = TestOptions();
  options.regions.socket.path = path_;
  options.regions.regions.lease = absl::Milliseconds(500);
  return options;
}

void RegionTest::StartShared(const ServerOptions& options) {
  Start(options);
  connection_ = std::make_unique<RegionConnection>(path_);
  ASSERT_TRUE(connection_->connected());
}

std::string RegionTest::Register(const SharedFile& file) {
  const v1::RegisterDescriptorResponse response = connection_->Register(file);
  EXPECT_EQ(response.code(), 0U) << response.message();
  return response.handle();
}

v1::GetRegionResponse RegionTest::Get(const std::string& handle) {
  grpc::ClientContext context;
  v1::GetRegionRequest request;
  request.set_handle(handle);
  v1::GetRegionResponse response;
  Regions()->GetRegion(&context, request, &response);
  return response;
}

RegionTest::Placed RegionTest::Place(const PromptData& data, bool results) {
  Placed placed;
  placed.file = SharedFile::Sealed(RangedPrompt::BytesFor(data));
  placed.ranged =
      std::make_unique<RangedPrompt>(data, placed.file.get(), Register(*placed.file), results);
  return placed;
}

std::vector<v1::CompressRequest> RegionTest::Messages(const PromptData& data, Placed* placed,
                                                      bool keys_and_values) {
  std::vector<v1::CompressRequest> messages = AllMessages(data);
  for (v1::CompressRequest& message : messages) {
    if (message.has_open()) *message.mutable_open() = placed->ranged->Open(message.open());
    if (message.has_pieces()) message = placed->ranged->Put(message, keys_and_values);
  }
  return messages;
}

}  // namespace structkv::testkit
