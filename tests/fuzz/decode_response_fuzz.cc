// DecodeResponse against protobuf's parser.
#include "tests/fuzz/wire_differential.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto decode = [](const grpc::ByteBuffer& buffer) {
    absl::StatusOr<structkv::wire::Response> response = structkv::wire::DecodeResponse(buffer);
    if (response.ok()) FUZZ_CHECK(structkv::wire::testing::RunsLieInSlices(response->pieces));
    return response;
  };
  structkv::fuzz::CheckAgainstProtobuf<structkv::v1::CompressResponse>(
      {data, size}, structkv::v1::CompressResponse::kFailedFieldNumber, decode);
  return 0;
}
