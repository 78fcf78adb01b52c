#include "client/cli/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <tuple>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"

namespace structkv::cli {
namespace {

using Json = nlohmann::json;

constexpr size_t kLengthBytes = 8;

struct DTypeEntry {
  std::string_view name;
  uint64_t bytes;
};
constexpr DTypeEntry kDTypes[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
    {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
    {"U32", 4},  {"F32", 4}, {"F64", 8}, {"I64", 8},     {"U64", 8},
};

template <typename... Args>
absl::Status Invalid(const Args&... args) {
  return absl::InvalidArgumentError(absl::StrCat(args...));
}

// A header is three deep. What is much deeper is refused while it is read: the library prints and
// copies values recursively.
constexpr int kMaxJsonDepth = 16;

// Parses JSON without exceptions; refuses names that come twice in one object, which the library
// would merge in silence.
absl::StatusOr<Json> ParseJson(std::string_view text) {
  std::vector<std::set<std::string>> names;
  std::string twice;
  bool too_deep = false;
  const Json::parser_callback_t check = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > kMaxJsonDepth) {
      too_deep = true;
      return false;
    }
    if (event == Json::parse_event_t::object_start) {
      names.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      if (!names.empty()) names.pop_back();
    } else if (event == Json::parse_event_t::key && !names.empty()) {
      const auto* name = value.get_ptr<const std::string*>();
      if (!names.back().insert(*name).second) twice = *name;
    }
    return true;
  };
  Json json = Json::parse(text.begin(), text.end(), check, /*allow_exceptions=*/false);
  if (too_deep) return Invalid("the header is nested deeper than ", kMaxJsonDepth, " levels");
  if (json.is_discarded() || !json.is_object()) return Invalid("the header is no JSON object");
  if (!twice.empty()) return Invalid("the header names '", twice, "' twice");
  return json;
}

absl::StatusOr<TensorInfo> ParseTensor(const std::string& name, const Json& json,
                                       uint64_t data_bytes) {
  const auto field = [&](const char* key) -> const Json* {
    const auto it = json.find(key);
    return it == json.end() ? nullptr : &*it;
  };
  if (!json.is_object()) return Invalid("tensor '", name, "' is no JSON object");
  const Json* dtype = field("dtype");
  const Json* shape = field("shape");
  const Json* offsets = field("data_offsets");
  if (dtype == nullptr || shape == nullptr || offsets == nullptr || json.size() != 3) {
    return Invalid("tensor '", name, "' must have dtype, shape and data_offsets, and nothing else");
  }
  TensorInfo info;
  const auto* dtype_name = dtype->get_ptr<const std::string*>();
  if (dtype_name == nullptr || SafetensorsElementBytes(*dtype_name) == 0) {
    return Invalid("tensor '", name, "': dtype ", dtype->dump(), " is unknown");
  }
  info.dtype = *dtype_name;
  if (!shape->is_array()) return Invalid("tensor '", name, "': shape is no array");
  uint64_t bytes = SafetensorsElementBytes(info.dtype);
  for (const Json& extent : *shape) {
    if (!extent.is_number_unsigned()) {
      return Invalid("tensor '", name, "': shape ", shape->dump(),
                     " has an extent that is no count");
    }
    const auto value = extent.get<uint64_t>();
    if (value > uint64_t{INT64_MAX} || __builtin_mul_overflow(bytes, value, &bytes)) {
      return Invalid("tensor '", name, "': shape ", shape->dump(), " is too large");
    }
    info.shape.push_back(static_cast<int64_t>(value));
  }
  if (!offsets->is_array() || offsets->size() != 2 || !(*offsets)[0].is_number_unsigned() ||
      !(*offsets)[1].is_number_unsigned()) {
    return Invalid("tensor '", name, "': data_offsets must be two counts, not ", offsets->dump());
  }
  info.begin = (*offsets)[0].get<uint64_t>();
  info.end = (*offsets)[1].get<uint64_t>();
  if (info.begin > info.end || info.end > data_bytes) {
    return Invalid("tensor '", name, "': data_offsets ", offsets->dump(), " leave the file's ",
                   data_bytes, " bytes of data");
  }
  if (info.size_bytes() != bytes) {
    return Invalid("tensor '", name, "': ", info.dtype, " of shape ", ShapeText(info.shape),
                   " takes ", bytes, " bytes, data_offsets give ", info.size_bytes());
  }
  return info;
}

uint64_t LoadLittleEndian64(const unsigned char* bytes) {
  uint64_t value = 0;
  for (size_t i = kLengthBytes; i > 0; --i) value = value << 8 | bytes[i - 1];
  return value;
}

absl::Status SystemError(const std::string& path, const char* what, int error) {
  const std::string text = absl::StrCat(path, ": ", what, ": ", std::strerror(error));
  if (error == ENOENT) return absl::NotFoundError(text);
  if (error == EACCES) return absl::PermissionDeniedError(text);
  return absl::UnknownError(text);
}

}  // namespace

uint64_t SafetensorsElementBytes(std::string_view dtype) {
  for (const DTypeEntry& entry : kDTypes) {
    if (entry.name == dtype) return entry.bytes;
  }
  return 0;
}

std::string ShapeText(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view json,
                                                         uint64_t data_bytes) {
  absl::StatusOr<Json> parsed = ParseJson(json);
  if (!parsed.ok()) return parsed.status();
  SafetensorsHeader header;
  for (const auto& [name, value] : parsed->items()) {
    if (name != "__metadata__") {
      absl::StatusOr<TensorInfo> info = ParseTensor(name, value, data_bytes);
      if (!info.ok()) return info.status();
      header.tensors.emplace(name, *std::move(info));
      continue;
    }
    if (!value.is_object()) return Invalid("__metadata__ is no JSON object");
    for (const auto& [key, text] : value.items()) {
      const auto* string = text.get_ptr<const std::string*>();
      if (string == nullptr) return Invalid("__metadata__ '", key, "' is no string");
      header.metadata.emplace(key, *string);
    }
  }
  std::vector<std::pair<uint64_t, const std::pair<const std::string, TensorInfo>*>> order;
  for (const auto& entry : header.tensors) order.emplace_back(entry.second.begin, &entry);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::tie(a.first, a.second->second.end) < std::tie(b.first, b.second->second.end);
  });
  uint64_t covered = 0;
  for (const auto& [begin, entry] : order) {
    if (begin != covered) {
      return Invalid("tensor '", entry->first, "' starts at byte ", begin,
                     begin < covered ? " and overlaps the one before, which ends at "
                                     : " and leaves a gap after the one before, which ends at ",
                     covered);
    }
    covered = entry->second.end;
  }
  if (covered != data_bytes) {
    return Invalid("the tensors end at byte ", covered, " of ", data_bytes, " bytes of data");
  }
  return header;
}

absl::StatusOr<std::shared_ptr<const SafetensorsFile>> SafetensorsFile::Open(
    const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return SystemError(path, "cannot open", errno);
  const absl::Cleanup close_fd = [fd] { close(fd); };
  struct stat status = {};
  if (fstat(fd, &status) != 0) return SystemError(path, "cannot stat", errno);
  if (!S_ISREG(status.st_mode)) return Invalid(path, ": not a regular file");
  const auto size = static_cast<uint64_t>(status.st_size);
  if (size < kLengthBytes) {
    return Invalid(path, ": ", size, " bytes are too few for a safetensors file");
  }
  void* map = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (map == MAP_FAILED) return SystemError(path, "cannot map", errno);
  std::shared_ptr<SafetensorsFile> file(new SafetensorsFile());
  file->path_ = path;
  file->map_ = map;
  file->map_size_ = size;
  const uint64_t header_bytes = LoadLittleEndian64(static_cast<const unsigned char*>(map));
  if (header_bytes > kMaxSafetensorsHeaderBytes || header_bytes > size - kLengthBytes) {
    return Invalid(path, ": a header of ", header_bytes, " bytes does not fit a file of ", size,
                   " (at most ", kMaxSafetensorsHeaderBytes, ")");
  }
  file->data_begin_ = kLengthBytes + header_bytes;
  const std::string_view json(static_cast<const char*>(map) + kLengthBytes, header_bytes);
  absl::StatusOr<SafetensorsHeader> header = ParseSafetensorsHeader(json, size - file->data_begin_);
  if (!header.ok()) {
    return absl::Status(header.status().code(),
                        absl::StrCat(path, ": ", header.status().message()));
  }
  file->header_ = *std::move(header);
  return file;
}

SafetensorsFile::~SafetensorsFile() {
  if (map_ != nullptr) munmap(map_, map_size_);
}

const TensorInfo* SafetensorsFile::Find(const std::string& name) const {
  const auto it = header_.tensors.find(name);
  return it == header_.tensors.end() ? nullptr : &it->second;
}

absl::Span<const std::byte> SafetensorsFile::Data(const TensorInfo& tensor) const {
  return {static_cast<const std::byte*>(map_) + data_begin_ + tensor.begin, tensor.size_bytes()};
}

template <typename T>
std::vector<T> SafetensorsFile::Values(const TensorInfo& tensor) const {
  std::vector<T> values(tensor.size_bytes() / sizeof(T));
  if (!values.empty()) {
    std::memcpy(values.data(), Data(tensor).data(), values.size() * sizeof(T));
  }
  return values;
}
template std::vector<float> SafetensorsFile::Values(const TensorInfo&) const;
template std::vector<int32_t> SafetensorsFile::Values(const TensorInfo&) const;

}  // namespace structkv::cli
