// DecodeFetchResponse against protobuf's parser.
#include "tests/fuzz/wire_differential.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto decode = [](const grpc::ByteBuffer& buffer) {
    auto response = structkv::wire::DecodeFetchResponse(buffer);
    if (response.ok()) FUZZ_CHECK(structkv::wire::testing::RunsLieInSlices(response->pieces));
    return response;
  };
  structkv::fuzz::CheckAgainstProtobuf<structkv::v1::FetchCacheResponse>(
      {data, size}, structkv::v1::FetchCacheResponse::kSummaryFieldNumber, decode);
  return 0;
}
