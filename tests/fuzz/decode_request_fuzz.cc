// DecodeRequest against protobuf's parser.
#include <variant>

#include "tests/fuzz/wire_differential.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using structkv::wire::Pieces;
  const auto decode = [](const grpc::ByteBuffer& buffer) {
    absl::StatusOr<structkv::wire::Request> request = structkv::wire::DecodeRequest(buffer);
    if (request.ok() && std::holds_alternative<Pieces>(*request)) {
      FUZZ_CHECK(structkv::wire::testing::RunsLieInSlices(std::get<Pieces>(*request)));
    }
    return request;
  };
  structkv::fuzz::CheckAgainstProtobuf<structkv::v1::CompressRequest>(
      {data, size}, structkv::v1::CompressRequest::kCommitFieldNumber, decode);
  return 0;
}
