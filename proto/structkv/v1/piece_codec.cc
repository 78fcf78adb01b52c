#include "structkv/v1/piece_codec.h"

#include <array>
#include <string>
#include <utility>

#define XXH_STATIC_LINKING_ONLY  // a hash state on the stack
#include <xxhash.h>

#include "absl/strings/str_cat.h"
#include "google/protobuf/io/coded_stream.h"
#include "structkv/v1/slice_cursor.h"

namespace structkv::wire {
namespace {

using google::protobuf::io::CodedOutputStream;

// Below this a copy costs less than a slice of its own.
constexpr size_t kInlineBytes = 4096;

constexpr uint32_t kPieceField = v1::TensorPieces::kPiecesFieldNumber;

// Beside the oneof of either message.
constexpr uint32_t kPromptField = v1::CompressRequest::kPromptFieldNumber;
static_assert(kPromptField == v1::CompressResponse::kPromptFieldNumber);

constexpr uint32_t MakeTag(uint32_t field, WireType type) {
  return field << 3 | static_cast<uint32_t>(type);
}

absl::StatusOr<std::vector<grpc::Slice>> Slices(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  if (buffer.Valid() && !buffer.Dump(&slices).ok()) {
    return absl::InvalidArgumentError("message cannot be read from its buffer");
  }
  return slices;
}

// ---------------------------------------------------------------------------------------------
// Reading

// Reads a range into one that may have been read before: protobuf merges them.
absl::Status ReadRange(SliceCursor& cursor, uint64_t end, Range& range) {
  while (cursor.position() < end) {
    const absl::StatusOr<Tag> tag = cursor.ReadTag(end);
    if (!tag.ok()) return tag.status();
    if (tag->type != WireType::kVarint || tag->field < v1::RegionRange::kRegionFieldNumber ||
        tag->field > v1::RegionRange::kSizeBytesFieldNumber) {
      if (absl::Status skipped = cursor.SkipValue(tag->type, end); !skipped.ok()) return skipped;
      continue;
    }
    const absl::StatusOr<uint64_t> value = cursor.ReadVarint(end);
    if (!value.ok()) return value.status();
    if (tag->field == v1::RegionRange::kRegionFieldNumber) {
      range.region = static_cast<uint32_t>(*value);
    } else if (tag->field == v1::RegionRange::kOffsetBytesFieldNumber) {
      range.offset_bytes = *value;
    } else {
      range.size_bytes = *value;
    }
  }
  return absl::OkStatus();
}

// The same of a transfer.
absl::Status ReadTransfer(SliceCursor& cursor, uint64_t end, Transfer& transfer) {
  while (cursor.position() < end) {
    const absl::StatusOr<Tag> tag = cursor.ReadTag(end);
    if (!tag.ok()) return tag.status();
    if (tag->field == v1::PairTransfer::kKeyFieldNumber && tag->type == WireType::kBytes) {
      const absl::StatusOr<uint64_t> to = cursor.ReadLength(end);
      if (!to.ok()) return to.status();
      transfer.key.clear();
      cursor.ReadRuns(*to, [&](const uint8_t* data, size_t size) {
        transfer.key.append(reinterpret_cast<const char*>(data), size);
      });
    } else if (tag->field == v1::PairTransfer::kSizeBytesFieldNumber &&
               tag->type == WireType::kVarint) {
      const absl::StatusOr<uint64_t> value = cursor.ReadVarint(end);
      if (!value.ok()) return value.status();
      transfer.size_bytes = *value;
    } else if (absl::Status skipped = cursor.SkipValue(tag->type, end); !skipped.ok()) {
      return skipped;
    }
  }
  return absl::OkStatus();
}

absl::Status ReadPiece(SliceCursor& cursor, uint64_t end, Piece& piece) {
  while (cursor.position() < end) {
    const absl::StatusOr<Tag> tag = cursor.ReadTag(end);
    if (!tag.ok()) return tag.status();
    const bool is_varint = tag->type == WireType::kVarint;
    if (tag->field == v1::TensorPiece::kDataFieldNumber && tag->type == WireType::kBytes) {
      const absl::StatusOr<uint64_t> to = cursor.ReadLength(end);
      if (!to.ok()) return to.status();
      piece.data.clear();
      piece.range.reset();  // the other members of the oneof
      piece.transfer.reset();
      cursor.ReadRuns(*to, [&](const uint8_t* data, size_t size) {
        piece.data.emplace_back(reinterpret_cast<const std::byte*>(data), size);
      });
    } else if (tag->field == v1::TensorPiece::kRangeFieldNumber && tag->type == WireType::kBytes) {
      const absl::StatusOr<uint64_t> to = cursor.ReadLength(end);
      if (!to.ok()) return to.status();
      piece.data.clear();
      piece.transfer.reset();
      if (!piece.range.has_value()) piece.range.emplace();
      if (absl::Status read = ReadRange(cursor, *to, *piece.range); !read.ok()) return read;
    } else if (tag->field == v1::TensorPiece::kTransferFieldNumber &&
               tag->type == WireType::kBytes) {
      const absl::StatusOr<uint64_t> to = cursor.ReadLength(end);
      if (!to.ok()) return to.status();
      piece.data.clear();
      piece.range.reset();
      if (!piece.transfer.has_value()) piece.transfer.emplace();
      if (absl::Status read = ReadTransfer(cursor, *to, *piece.transfer); !read.ok()) return read;
    } else if (tag->field == v1::TensorPiece::kXxh364FieldNumber &&
               tag->type == WireType::kFixed64) {
      const absl::StatusOr<uint64_t> value = cursor.ReadFixed64(end);
      if (!value.ok()) return value.status();
      piece.xxh3_64 = *value;
    } else if (is_varint && tag->field >= v1::TensorPiece::kLayerFieldNumber &&
               tag->field <= v1::TensorPiece::kOffsetBytesFieldNumber) {
      const absl::StatusOr<uint64_t> value = cursor.ReadVarint(end);
      if (!value.ok()) return value.status();
      // Narrow numbers are cut to 32 bits, as protobuf does.
      if (tag->field == v1::TensorPiece::kLayerFieldNumber) {
        piece.layer = static_cast<uint32_t>(*value);
      } else if (tag->field == v1::TensorPiece::kTensorFieldNumber) {
        piece.tensor = static_cast<int>(static_cast<uint32_t>(*value));
      } else {
        piece.offset_bytes = *value;
      }
    } else if (absl::Status skipped = cursor.SkipValue(tag->type, end); !skipped.ok()) {
      return skipped;
    }
  }
  return absl::OkStatus();
}

// Reads one more piece after its tag.
absl::Status AddPiece(SliceCursor& cursor, uint64_t end, std::vector<Piece>& pieces) {
  const absl::StatusOr<uint64_t> to = cursor.ReadLength(end);
  if (!to.ok()) return to.status();
  if (pieces.size() >= kMaxPiecesPerMessage) {
    return cursor.Error(absl::StrCat("more than ", kMaxPiecesPerMessage, " pieces in a message"));
  }
  return ReadPiece(cursor, *to, pieces.emplace_back());
}

// Reads a message that holds pieces in field `piece_field`. Its other fields are skipped, or
// appended to `rest` as they are.
absl::Status ReadPieces(SliceCursor& cursor, uint64_t end, uint32_t piece_field,
                        std::vector<Piece>& pieces, std::string* rest) {
  while (cursor.position() < end) {
    const SliceCursor start = cursor;
    const absl::StatusOr<Tag> tag = cursor.ReadTag(end);
    if (!tag.ok()) return tag.status();
    if (tag->field == piece_field && tag->type == WireType::kBytes) {
      if (absl::Status added = AddPiece(cursor, end, pieces); !added.ok()) return added;
      continue;
    }
    if (absl::Status skipped = cursor.SkipValue(tag->type, end); !skipped.ok()) return skipped;
    if (rest == nullptr) continue;
    SliceCursor again = start;
    again.ReadRuns(cursor.position(), [&](const uint8_t* data, size_t size) {
      rest->append(reinterpret_cast<const char*>(data), size);
    });
  }
  return absl::OkStatus();
}

// What the top level of a message holds: the member of its oneof that came last, with its pieces if
// it has any. `PieceField(member)` is the number of the field of pieces within a member, or 0.
struct TopLevel {
  uint32_t member = 0;
  uint32_t prompt = 0;
  std::vector<Piece> pieces;
  std::string rest;  // the member's other fields, encoded
};

template <typename PieceField>
absl::Status ReadTopLevel(absl::Span<const grpc::Slice> slices, uint32_t last_member,
                          bool keep_rest, PieceField piece_field, TopLevel& top) {
  SliceCursor cursor(slices);
  const uint64_t end = cursor.size();
  while (cursor.position() < end) {
    const absl::StatusOr<Tag> tag = cursor.ReadTag(end);
    if (!tag.ok()) return tag.status();
    if (tag->type == WireType::kVarint && tag->field == kPromptField) {
      const absl::StatusOr<uint64_t> value = cursor.ReadVarint(end);
      if (!value.ok()) return value.status();
      top.prompt = static_cast<uint32_t>(*value);
      continue;
    }
    if (tag->type != WireType::kBytes || tag->field > last_member) {
      if (absl::Status skipped = cursor.SkipValue(tag->type, end); !skipped.ok()) return skipped;
      continue;
    }
    const absl::StatusOr<uint64_t> to = cursor.ReadLength(end);
    if (!to.ok()) return to.status();
    if (tag->field != top.member) {  // a oneof: a later member drops what another one held
      top.member = tag->field;
      top.pieces.clear();
      top.rest.clear();
    }
    const uint32_t field = piece_field(tag->field);
    if (field == 0) {
      cursor.SkipTo(*to);
      continue;
    }
    absl::Status read = ReadPieces(cursor, *to, field, top.pieces, keep_rest ? &top.rest : nullptr);
    if (!read.ok()) return read;
  }
  return absl::OkStatus();
}

// The field of pieces within a member of `CompressResponse`; 0: it has none.
uint32_t PieceFieldOfAnswer(uint32_t member) {
  switch (member) {
    case v1::CompressResponse::kLayerFieldNumber:
      return v1::LayerResult::kPiecesFieldNumber;
    case v1::CompressResponse::kPivotFieldNumber:
      return v1::PivotDecision::kPiecesFieldNumber;
    case v1::CompressResponse::kPullFieldNumber:
      return v1::RowPull::kPiecesFieldNumber;
    default:
      return 0;
  }
}

absl::Status ParseWhole(absl::Span<const grpc::Slice> slices,
                        google::protobuf::MessageLite& message) {
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  if (message.ParseFromString(bytes)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("message of ", bytes.size(), " bytes is no ", message.GetTypeName()));
}

// ---------------------------------------------------------------------------------------------
// Writing

// Collects a message: small parts in one buffer, large ones as slices of their own.
class SliceWriter {
 public:
  void Varint(uint64_t value) {
    std::array<uint8_t, 10> bytes;
    uint8_t* end = CodedOutputStream::WriteVarint64ToArray(value, bytes.data());
    Copy(bytes.data(), static_cast<size_t>(end - bytes.data()));
  }

  void Fixed64(uint64_t value) {
    std::array<uint8_t, 8> bytes;
    CodedOutputStream::WriteLittleEndian64ToArray(value, bytes.data());
    Copy(bytes.data(), bytes.size());
  }

  void Copy(const void* data, size_t size) {
    pending_.append(static_cast<const char*>(data), size);
  }

  void Data(absl::Span<const std::byte> data, const Keepalive& owner) {
    if (data.size() < kInlineBytes || owner == nullptr) return Copy(data.data(), data.size());
    Flush();
    // gRPC's signature asks for a pointer to non-const; it only reads.
    slices_.emplace_back(
        const_cast<std::byte*>(data.data()), data.size(),
        [](void* held) { delete static_cast<Keepalive*>(held); }, new Keepalive(owner));
  }

  grpc::ByteBuffer Finish() {
    Flush();
    if (slices_.empty()) slices_.emplace_back();
    return {slices_.data(), slices_.size()};
  }

 private:
  void Flush() {
    if (pending_.empty()) return;
    slices_.emplace_back(pending_.data(), pending_.size());
    pending_.clear();
  }

  std::string pending_;
  std::vector<grpc::Slice> slices_;
};

size_t VarintSize(uint64_t value) { return CodedOutputStream::VarintSize64(value); }

size_t FieldSize(size_t value_size) { return 1 + VarintSize(value_size) + value_size; }

size_t RangeSize(const Range& range) {
  size_t size = 0;
  if (range.region != 0) size += 1 + VarintSize(range.region);
  if (range.offset_bytes != 0) size += 1 + VarintSize(range.offset_bytes);
  if (range.size_bytes != 0) size += 1 + VarintSize(range.size_bytes);
  return size;
}

void WriteRange(const Range& range, SliceWriter& out) {
  out.Varint(MakeTag(v1::TensorPiece::kRangeFieldNumber, WireType::kBytes));
  out.Varint(RangeSize(range));
  const auto number = [&out](uint32_t field, uint64_t value) {
    if (value == 0) return;
    out.Varint(MakeTag(field, WireType::kVarint));
    out.Varint(value);
  };
  number(v1::RegionRange::kRegionFieldNumber, range.region);
  number(v1::RegionRange::kOffsetBytesFieldNumber, range.offset_bytes);
  number(v1::RegionRange::kSizeBytesFieldNumber, range.size_bytes);
}

size_t TransferSize(const Transfer& transfer) {
  size_t size = transfer.key.empty() ? 0 : FieldSize(transfer.key.size());
  if (transfer.size_bytes != 0) size += 1 + VarintSize(transfer.size_bytes);
  return size;
}

void WriteTransfer(const Transfer& transfer, SliceWriter& out) {
  out.Varint(MakeTag(v1::TensorPiece::kTransferFieldNumber, WireType::kBytes));
  out.Varint(TransferSize(transfer));
  if (!transfer.key.empty()) {
    out.Varint(MakeTag(v1::PairTransfer::kKeyFieldNumber, WireType::kBytes));
    out.Varint(transfer.key.size());
    out.Copy(transfer.key.data(), transfer.key.size());
  }
  if (transfer.size_bytes == 0) return;
  out.Varint(MakeTag(v1::PairTransfer::kSizeBytesFieldNumber, WireType::kVarint));
  out.Varint(transfer.size_bytes);
}

size_t SourceSize(const OutgoingPiece& piece) {
  if (piece.range.has_value()) return RangeSize(*piece.range);
  return piece.transfer.has_value() ? TransferSize(*piece.transfer) : piece.data.size();
}

size_t PieceSize(const OutgoingPiece& piece) {
  size_t size = FieldSize(SourceSize(piece));
  if (piece.layer != 0) size += 1 + VarintSize(piece.layer);
  if (piece.tensor != 0) size += 1 + VarintSize(static_cast<uint64_t>(piece.tensor));
  if (piece.offset_bytes != 0) size += 1 + VarintSize(piece.offset_bytes);
  if (piece.xxh3_64.has_value()) size += 1 + 8;
  return size;
}

void WritePiece(uint32_t field, const OutgoingPiece& piece, SliceWriter& out) {
  out.Varint(MakeTag(field, WireType::kBytes));
  out.Varint(PieceSize(piece));
  if (piece.layer != 0) {
    out.Varint(MakeTag(v1::TensorPiece::kLayerFieldNumber, WireType::kVarint));
    out.Varint(piece.layer);
  }
  if (piece.tensor != 0) {
    out.Varint(MakeTag(v1::TensorPiece::kTensorFieldNumber, WireType::kVarint));
    out.Varint(static_cast<uint64_t>(piece.tensor));
  }
  if (piece.offset_bytes != 0) {
    out.Varint(MakeTag(v1::TensorPiece::kOffsetBytesFieldNumber, WireType::kVarint));
    out.Varint(piece.offset_bytes);
  }
  if (piece.xxh3_64.has_value()) {
    out.Varint(MakeTag(v1::TensorPiece::kXxh364FieldNumber, WireType::kFixed64));
    out.Fixed64(*piece.xxh3_64);
  }
  if (piece.range.has_value()) return WriteRange(*piece.range, out);
  if (piece.transfer.has_value()) return WriteTransfer(*piece.transfer, out);
  out.Varint(MakeTag(v1::TensorPiece::kDataFieldNumber, WireType::kBytes));
  out.Varint(piece.data.size());
  out.Data(piece.data, piece.owner);
}

// A message whose member `member` is made of `rest`, encoded, and pieces in field `piece_field`.
grpc::ByteBuffer EncodeMember(uint32_t member, const std::string& rest, uint32_t piece_field,
                              absl::Span<const OutgoingPiece> pieces, uint32_t prompt) {
  size_t size = rest.size();
  for (const OutgoingPiece& piece : pieces) size += FieldSize(PieceSize(piece));
  SliceWriter out;
  out.Varint(MakeTag(member, WireType::kBytes));
  out.Varint(size);
  out.Copy(rest.data(), rest.size());
  for (const OutgoingPiece& piece : pieces) WritePiece(piece_field, piece, out);
  if (prompt != 0) {
    out.Varint(MakeTag(kPromptField, WireType::kVarint));
    out.Varint(prompt);
  }
  return out.Finish();
}

}  // namespace

uint64_t Piece::size_bytes() const {
  if (range.has_value()) return range->size_bytes;
  if (transfer.has_value()) return transfer->size_bytes;
  uint64_t size = 0;
  for (const absl::Span<const std::byte> run : data) size += run.size();
  return size;
}

absl::StatusOr<Request> DecodeRequest(const grpc::ByteBuffer& buffer) {
  absl::StatusOr<std::vector<grpc::Slice>> slices = Slices(buffer);
  if (!slices.ok()) return slices.status();
  TopLevel top;
  const auto piece_field = [](uint32_t member) {
    return member == v1::CompressRequest::kPiecesFieldNumber ? kPieceField : 0;
  };
  absl::Status read = ReadTopLevel(*slices, v1::CompressRequest::kCommitFieldNumber,
                                   /*keep_rest=*/false, piece_field, top);
  if (!read.ok()) return read;
  if (top.member == v1::CompressRequest::kPiecesFieldNumber) {
    Pieces pieces;
    pieces.prompt = top.prompt;
    pieces.slices = *std::move(slices);
    pieces.pieces = std::move(top.pieces);
    return Request(std::move(pieces));
  }
  v1::CompressRequest message;
  if (absl::Status parsed = ParseWhole(*slices, message); !parsed.ok()) return parsed;
  return Request(std::move(message));
}

absl::StatusOr<Response> DecodeResponse(const grpc::ByteBuffer& buffer) {
  absl::StatusOr<std::vector<grpc::Slice>> slices = Slices(buffer);
  if (!slices.ok()) return slices.status();
  TopLevel top;
  absl::Status read = ReadTopLevel(*slices, v1::CompressResponse::kFailedFieldNumber,
                                   /*keep_rest=*/true, PieceFieldOfAnswer, top);
  if (!read.ok()) return read;
  Response response;
  if (PieceFieldOfAnswer(top.member) == 0) {
    if (absl::Status parsed = ParseWhole(*slices, response.message); !parsed.ok()) return parsed;
    return response;
  }
  google::protobuf::MessageLite* member = response.message.mutable_pull();
  absl::string_view name = "pull";
  if (top.member == v1::CompressResponse::kLayerFieldNumber) {
    member = response.message.mutable_layer();
    name = "layer";
  } else if (top.member == v1::CompressResponse::kPivotFieldNumber) {
    member = response.message.mutable_pivot();
    name = "pivot";
  }
  if (!member->ParseFromString(top.rest)) {
    return absl::InvalidArgumentError(
        absl::StrCat("message cannot be parsed: bad field in `", name, "`"));
  }
  response.message.set_prompt(top.prompt);
  response.pieces.slices = *std::move(slices);
  response.pieces.pieces = std::move(top.pieces);
  return response;
}

absl::StatusOr<FetchResponse> DecodeFetchResponse(const grpc::ByteBuffer& buffer) {
  absl::StatusOr<std::vector<grpc::Slice>> slices = Slices(buffer);
  if (!slices.ok()) return slices.status();
  constexpr uint32_t kLayer = v1::FetchCacheResponse::kLayerFieldNumber;
  TopLevel top;
  const auto piece_field = [](uint32_t member) {
    return member == kLayer ? uint32_t{v1::LayerResult::kPiecesFieldNumber} : 0;
  };
  absl::Status read = ReadTopLevel(*slices, v1::FetchCacheResponse::kSummaryFieldNumber,
                                   /*keep_rest=*/true, piece_field, top);
  if (!read.ok()) return read;
  FetchResponse response;
  if (top.member != kLayer) {
    if (absl::Status parsed = ParseWhole(*slices, response.message); !parsed.ok()) return parsed;
    return response;
  }
  if (!response.message.mutable_layer()->ParseFromString(top.rest)) {
    return absl::InvalidArgumentError("message cannot be parsed: bad field in `layer`");
  }
  response.pieces.slices = *std::move(slices);
  response.pieces.pieces = std::move(top.pieces);
  return response;
}

grpc::ByteBuffer EncodeRequest(absl::Span<const OutgoingPiece> pieces, uint32_t prompt) {
  return EncodeMember(v1::CompressRequest::kPiecesFieldNumber, {}, kPieceField, pieces, prompt);
}

grpc::ByteBuffer EncodeResponse(const v1::CompressResponse& message,
                                absl::Span<const OutgoingPiece> pieces) {
  if (message.has_layer()) {
    return EncodeMember(v1::CompressResponse::kLayerFieldNumber,
                        message.layer().SerializeAsString(), v1::LayerResult::kPiecesFieldNumber,
                        pieces, message.prompt());
  }
  if (message.has_pivot()) {
    return EncodeMember(v1::CompressResponse::kPivotFieldNumber,
                        message.pivot().SerializeAsString(), v1::PivotDecision::kPiecesFieldNumber,
                        pieces, message.prompt());
  }
  if (message.has_pull()) {
    return EncodeMember(v1::CompressResponse::kPullFieldNumber, message.pull().SerializeAsString(),
                        v1::RowPull::kPiecesFieldNumber, pieces, message.prompt());
  }
  return Encode(message);
}

grpc::ByteBuffer EncodeFetchedLayer(const v1::LayerResult& layer,
                                    absl::Span<const OutgoingPiece> pieces) {
  return EncodeMember(v1::FetchCacheResponse::kLayerFieldNumber, layer.SerializeAsString(),
                      v1::LayerResult::kPiecesFieldNumber, pieces, /*prompt=*/0);
}

grpc::ByteBuffer Encode(const google::protobuf::MessageLite& message) {
  const std::string bytes = message.SerializeAsString();
  const grpc::Slice slice(bytes.data(), bytes.size());
  return {&slice, 1};
}

uint64_t Checksum(absl::Span<const absl::Span<const std::byte>> data) {
  if (data.size() == 1) return XXH3_64bits(data[0].data(), data[0].size());
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  for (const absl::Span<const std::byte> run : data) {
    XXH3_64bits_update(&state, run.data(), run.size());
  }
  return XXH3_64bits_digest(&state);
}

}  // namespace structkv::wire
