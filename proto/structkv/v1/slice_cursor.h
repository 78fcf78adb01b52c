// Reads protobuf's wire format from a message that lies in several slices, without joining them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "grpcpp/support/slice.h"

namespace structkv::wire {

// Protobuf's wire types. Groups (3 and 4), long deprecated, are refused.
enum class WireType : uint8_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

struct Tag {
  uint32_t field = 0;
  WireType type = WireType::kVarint;
};

// A place in the slices. Every read is checked against `end`, a position that the caller gives: the
// end of the message, or of one nested in it. A failed read leaves the cursor somewhere before
// `end`. Errors are INVALID_ARGUMENT and name the byte.
class SliceCursor {
 public:
  // The slices outlive the cursor.
  explicit SliceCursor(absl::Span<const grpc::Slice> slices) : slices_(slices) {
    for (const grpc::Slice& slice : slices) size_ += slice.size();
    SkipFinished();
  }

  // Bytes before the cursor, and in all slices.
  uint64_t position() const { return position_; }
  uint64_t size() const { return size_; }

  absl::StatusOr<uint64_t> ReadVarint(uint64_t end) {
    uint64_t value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
      if (position_ >= end) return Error("a number is cut off");
      const uint8_t byte = Next();
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    return Error("a number has more than 10 bytes");
  }

  absl::StatusOr<uint64_t> ReadFixed64(uint64_t end) {
    if (end - position_ < 8) return Error("a fixed64 is cut off");
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value |= static_cast<uint64_t>(Next()) << (8 * i);
    return value;
  }

  absl::StatusOr<Tag> ReadTag(uint64_t end) {
    const uint64_t start = position_;
    const absl::StatusOr<uint64_t> value = ReadVarint(end);
    if (!value.ok()) return value.status();
    const uint64_t type = *value & 7;
    if (*value > UINT32_MAX || *value >> 3 == 0 || position_ - start > 5) {
      return Error("a field number is out of range");
    }
    if (type == 3 || type == 4) return Error("groups are not accepted");
    if (type > 5) return Error(absl::StrCat("there is no wire type ", type));
    return Tag{static_cast<uint32_t>(*value >> 3), static_cast<WireType>(type)};
  }

  // Reads the length of a nested field; returns the position at which the field ends.
  absl::StatusOr<uint64_t> ReadLength(uint64_t end) {
    const absl::StatusOr<uint64_t> length = ReadVarint(end);
    if (!length.ok()) return length.status();
    if (*length > end - position_) {
      return Error(absl::StrCat("a field of ", *length, " bytes has ", end - position_, " left"));
    }
    return position_ + *length;
  }

  // Calls run(data, size) for the bytes up to `to`, slice by slice. position() <= to <= size().
  template <typename Run>
  void ReadRuns(uint64_t to, Run run) {
    while (position_ < to) {
      const grpc::Slice& slice = slices_[slice_];
      const size_t size = std::min<uint64_t>(slice.size() - offset_, to - position_);
      run(slice.begin() + offset_, size);
      offset_ += size;
      position_ += size;
      SkipFinished();
    }
  }

  void SkipTo(uint64_t to) {
    ReadRuns(to, [](const uint8_t*, size_t) {});
  }

  // Skips the value of a field after its tag.
  absl::Status SkipValue(WireType type, uint64_t end) {
    uint64_t size = 0;
    switch (type) {
      case WireType::kVarint:
        return ReadVarint(end).status();
      case WireType::kBytes: {
        const absl::StatusOr<uint64_t> to = ReadLength(end);
        if (to.ok()) SkipTo(*to);
        return to.status();
      }
      case WireType::kFixed64:
        size = 8;
        break;
      case WireType::kFixed32:
        size = 4;
        break;
    }
    if (end - position_ < size) return Error("a field is cut off");
    SkipTo(position_ + size);
    return absl::OkStatus();
  }

  absl::Status Error(std::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat("message cannot be parsed at byte ", position_,
                                                   " of ", size_, ": ", AsAbsl(what)));
  }

 private:
  static absl::string_view AsAbsl(std::string_view text) { return {text.data(), text.size()}; }

  uint8_t Next() {
    const uint8_t byte = slices_[slice_].begin()[offset_];
    ++offset_;
    ++position_;
    SkipFinished();
    return byte;
  }

  void SkipFinished() {
    while (slice_ < slices_.size() && offset_ == slices_[slice_].size()) {
      ++slice_;
      offset_ = 0;
    }
  }

  absl::Span<const grpc::Slice> slices_;
  size_t slice_ = 0;   // index of the slice that holds the next byte
  size_t offset_ = 0;  // of the next byte in it
  uint64_t position_ = 0;
  uint64_t size_ = 0;
};

}  // namespace structkv::wire
