#include "client/cli/safetensors_writer.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace structkv::cli {
namespace {

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kAlignment = 64;  // of the data section in the file

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::string& path, std::vector<TensorDeclaration> tensors,
    size_t metadata_reserve_bytes) {
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter());
  uint64_t offset = 0;
  for (TensorDeclaration& declaration : tensors) {
    uint64_t bytes = SafetensorsElementBytes(declaration.dtype);
    if (bytes == 0) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": tensor '", declaration.name,
                                                     "' has unknown dtype ", declaration.dtype));
    }
    for (int64_t extent : declaration.shape) bytes *= static_cast<uint64_t>(extent);
    TensorInfo info{declaration.dtype, std::move(declaration.shape), offset, offset + bytes};
    offset += bytes;
    if (!writer->tensors_.emplace(declaration.name, std::move(info)).second) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor '", declaration.name, "' is declared twice"));
    }
    writer->order_.push_back(declaration.name);
  }
  const uint64_t needed = kLengthBytes + writer->Header({}).size() + metadata_reserve_bytes;
  writer->header_bytes_ = (needed + kAlignment - 1) / kAlignment * kAlignment - kLengthBytes;
  absl::StatusOr<std::unique_ptr<OutputFile>> file = OutputFile::Create(path);
  if (!file.ok()) return file.status();
  writer->file_ = *std::move(file);
  return writer;
}

std::string SafetensorsWriter::Header(const std::map<std::string, std::string>& metadata) const {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  for (const std::string& name : order_) {
    const TensorInfo& info = tensors_.at(name);
    nlohmann::ordered_json& entry = json[name];
    entry["dtype"] = info.dtype;
    entry["shape"] = info.shape;
    entry["data_offsets"] = {info.begin, info.end};
  }
  // Text that is no UTF-8 is replaced rather than refused: a file is better than none.
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

absl::Status SafetensorsWriter::Write(const std::string& name, absl::Span<const std::byte> data) {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    return absl::NotFoundError(
        absl::StrCat(file_->path(), ": tensor '", name, "' was not declared"));
  }
  if (data.size() != it->second.size_bytes()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file_->path(), ": tensor '", name, "' of ", ShapeText(it->second.shape),
                     " takes ", it->second.size_bytes(), " bytes, not ", data.size()));
  }
  if (!written_.emplace(name, true).second) {
    return absl::InvalidArgumentError(
        absl::StrCat(file_->path(), ": tensor '", name, "' was written before"));
  }
  return file_->WriteAt(kLengthBytes + header_bytes_ + it->second.begin, data);
}

absl::Status SafetensorsWriter::Finish(const std::map<std::string, std::string>& metadata) {
  for (const std::string& name : order_) {
    if (written_.count(name) == 0 && tensors_.at(name).size_bytes() > 0) {
      return absl::FailedPreconditionError(
          absl::StrCat(file_->path(), ": tensor '", name, "' was not written"));
    }
  }
  std::string header = Header(metadata);
  if (header.size() > header_bytes_) {
    return absl::InvalidArgumentError(
        absl::StrCat(file_->path(), ": the metadata take ", header.size(),
                     " bytes of header, reserved were ", header_bytes_));
  }
  header.resize(header_bytes_, ' ');
  std::string start;
  for (uint64_t i = 0; i < kLengthBytes; ++i) {
    start.push_back(static_cast<char>(header_bytes_ >> (8 * i) & 0xFF));
  }
  start += header;
  absl::Status status =
      file_->WriteAt(0, {reinterpret_cast<const std::byte*>(start.data()), start.size()});
  return status.ok() ? file_->Finish() : status;
}

}  // namespace structkv::cli
