// Holds a decoder of the wire codec to protobuf's parser. The input: a count of cuts, their
// lengths, and the message.
#pragma once

#include <string>
#include <vector>

#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/wire_format_lite.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/fuzz/quiet_protobuf.h"
#include "tests/proto/wire_testing.h"

namespace structkv::fuzz {

// The message with nothing of the members of its oneof but the one that came last, since its last
// change: what the codec reads, as members that lose are skipped. The top level is well-formed.
inline std::string LastMember(const std::string& bytes, uint32_t last_member) {
  using google::protobuf::internal::WireFormatLite;
  google::protobuf::io::CodedInputStream in(reinterpret_cast<const uint8_t*>(bytes.data()),
                                            static_cast<int>(bytes.size()));
  constexpr uint32_t kPromptTag = 10 << 3;  // beside the oneof
  std::string kept;
  std::string prompt;
  uint32_t member = 0;
  int begin = 0;
  while (const uint32_t tag = in.ReadTag()) {
    FUZZ_CHECK(WireFormatLite::SkipField(&in, tag));
    const uint32_t field = tag >> 3;
    if ((tag & 7) == 2 && field <= last_member) {
      if (field != member) kept.clear();
      member = field;
      kept.append(bytes, static_cast<size_t>(begin),
                  static_cast<size_t>(in.CurrentPosition() - begin));
    }
    if (tag == kPromptTag) {
      prompt.assign(bytes, static_cast<size_t>(begin),
                    static_cast<size_t>(in.CurrentPosition() - begin));
    }
    begin = in.CurrentPosition();
  }
  return kept + prompt;
}

template <typename Message, typename Decode>
void CheckAgainstProtobuf(FuzzInput input, uint32_t last_member, Decode decode) {
  using wire::testing::CutInto;
  using wire::testing::Normalized;
  using wire::testing::ToProto;

  std::vector<size_t> cuts(input.Byte() % 8);
  for (size_t& cut : cuts) cut = input.Byte();
  const std::string bytes = input.Rest();
  const auto decoded = decode(CutInto(bytes, cuts));
  const auto whole = decode(CutInto(bytes, {}));
  FUZZ_CHECK(decoded.status() == whole.status());
  FUZZ_CHECK(decoded.ok() || absl::IsInvalidArgument(decoded.status()));

  Message parsed;
  const bool is_valid = parsed.ParseFromString(bytes);
  if (decoded.ok()) {
    const std::string ours = Normalized(ToProto(*decoded));
    FUZZ_CHECK(ours == Normalized(ToProto(*whole)));
    Message expected;
    FUZZ_CHECK(expected.ParseFromString(LastMember(bytes, last_member)));
    FUZZ_CHECK(ours == Normalized(expected));
    FUZZ_CHECK(!is_valid || ours == Normalized(parsed));
  }
  if (is_valid) {  // the same as any protobuf library writes it
    parsed.DiscardUnknownFields();
    const auto canonical = decode(CutInto(parsed.SerializeAsString(), cuts));
    FUZZ_CHECK(canonical.ok());
    FUZZ_CHECK(Normalized(ToProto(*canonical)) == Normalized(parsed));
  }
}

}  // namespace structkv::fuzz
