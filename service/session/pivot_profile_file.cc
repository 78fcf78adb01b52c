#include "service/session/pivot_profile_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstdio>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace structkv::session {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kFormat[] = "structkv pivot profile 1";
constexpr size_t kMaxFileBytes = size_t{64} << 20;
constexpr int64_t kMaxLayers = 1 << 16;
constexpr int64_t kMaxCount = int64_t{1} << 53;
constexpr int kMaxSetAside = 1000;

absl::Status Errno(const std::string& path, const char* what) {
  return absl::ErrnoToStatus(errno, absl::StrCat(path, ": cannot ", what));
}

absl::Status Damaged(const char* what) { return absl::DataLossError(what); }

class File {
 public:
  File(const std::string& path, int flags) : fd_(open(path.c_str(), flags | O_CLOEXEC, 0644)) {}
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  bool ok() const { return fd_ >= 0; }
  int fd() const { return fd_; }

 private:
  const int fd_;
};

std::string Directory(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string Dump(const Json& json) {
  // Ids that are no UTF-8 have their bytes replaced.
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string Checksum(const std::string& text) {
  return absl::StrFormat("%016x", XXH3_64bits(text.data(), text.size()));
}

bool IntegerIn(const Json& json, int64_t least, int64_t most, int64_t* out) {
  if (!json.is_number_integer()) return false;
  *out = json.get<int64_t>();
  return *out >= least && *out <= most;
}

const Json* Member(const Json& json, const char* name) {
  if (!json.is_object()) return nullptr;
  const auto it = json.find(name);
  return it == json.end() ? nullptr : &*it;
}

absl::StatusOr<PivotRecord> DecodeRecord(const Json& json) {
  PivotRecord record;
  const Json* model = Member(json, "model");
  const Json* layers = Member(json, "layers");
  const Json* detection = Member(json, "detection");
  const Json* pivots = Member(json, "pivots");
  if (model == nullptr || layers == nullptr || detection == nullptr || pivots == nullptr) {
    return Damaged("a model lacks a member");
  }
  if (!model->is_string() || !IntegerIn(*layers, 1, kMaxLayers, &record.model.layers)) {
    return Damaged("a model has no name or no number of layers");
  }
  record.model.model_id = model->get<std::string>();
  if (!detection->is_array() || detection->size() != record.model.detection.size()) {
    return Damaged("a model's parameters are not six numbers");
  }
  for (size_t i = 0; i < detection->size(); ++i) {
    if (!(*detection)[i].is_number()) return Damaged("a model's parameter is no number");
    record.model.detection[i] = (*detection)[i].get<double>();
  }
  if (!pivots->is_array() || pivots->empty()) return Damaged("a model has no pivots");
  for (const Json& pivot : *pivots) {
    int64_t layer = 0;
    int64_t count = 0;
    if (!pivot.is_array() || pivot.size() != 2 ||
        !IntegerIn(pivot[0], 0, record.model.layers - 1, &layer) ||
        !IntegerIn(pivot[1], 1, kMaxCount, &count) || !record.counts.emplace(layer, count).second) {
      return Damaged("a pivot is no layer and count");
    }
  }
  return record;
}

bool WriteAll(int fd, const std::string& text) {
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t written = write(fd, text.data() + done, text.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    done += static_cast<size_t>(written);
  }
  return true;
}

}  // namespace

std::string EncodePivotFile(const std::vector<PivotRecord>& records) {
  Json models = Json::array();
  for (const PivotRecord& record : records) {
    Json model;
    model["model"] = record.model.model_id;
    model["layers"] = record.model.layers;
    model["detection"] = record.model.detection;
    model["pivots"] = Json::array();
    for (const auto& [layer, count] : record.counts) {
      model["pivots"].push_back({layer, count});
    }
    models.push_back(std::move(model));
  }
  Json file;
  file["format"] = kFormat;
  file["xxh3_64"] = Checksum(Dump(models));
  file["models"] = std::move(models);
  return Dump(file) + "\n";
}

absl::StatusOr<std::vector<PivotRecord>> DecodePivotFile(const std::string& text) {
  const Json file = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  const Json* format = Member(file, "format");
  const Json* checksum = Member(file, "xxh3_64");
  const Json* models = Member(file, "models");
  if (format == nullptr || *format != kFormat) return Damaged("it is no pivot profile");
  if (checksum == nullptr || models == nullptr || !models->is_array()) {
    return Damaged("it is not whole");
  }
  if (*checksum != Checksum(Dump(*models))) return Damaged("its checksum does not match");
  std::vector<PivotRecord> records;
  for (const Json& model : *models) {
    absl::StatusOr<PivotRecord> record = DecodeRecord(model);
    if (!record.ok()) return record.status();
    records.push_back(*std::move(record));
  }
  return records;
}

absl::StatusOr<std::string> ReadPivotFile(const std::string& path) {
  const File file(path, O_RDONLY);
  if (!file.ok()) return Errno(path, "open");
  std::string text;
  char buffer[16384];
  while (text.size() <= kMaxFileBytes) {
    const ssize_t got = read(file.fd(), buffer, sizeof(buffer));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return Errno(path, "read");
    if (got == 0) return text;
    text.append(buffer, static_cast<size_t>(got));
  }
  return std::string();  // no profile is that long; what is no profile is set aside
}

absl::Status WritePivotFile(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".tmp";
  {
    const File file(temporary, O_WRONLY | O_CREAT | O_TRUNC);
    if (!file.ok()) return Errno(temporary, "create");
    if (!WriteAll(file.fd(), text) || fsync(file.fd()) != 0) return Errno(temporary, "write");
  }
  if (rename(temporary.c_str(), path.c_str()) != 0) return Errno(path, "replace");
  // The new name is safe once the directory is.
  const File directory(Directory(path), O_RDONLY | O_DIRECTORY);
  if (!directory.ok() || fsync(directory.fd()) != 0) return Errno(Directory(path), "sync");
  return absl::OkStatus();
}

absl::StatusOr<std::string> SetPivotFileAside(const std::string& path) {
  for (int n = 0; n < kMaxSetAside; ++n) {
    const std::string name = absl::StrCat(path, ".damaged", n == 0 ? "" : absl::StrCat("-", n));
    struct stat info {};
    if (lstat(name.c_str(), &info) == 0) continue;
    if (rename(path.c_str(), name.c_str()) != 0) return Errno(path, "set aside");
    return name;
  }
  return absl::ResourceExhaustedError(
      absl::StrCat(path, ": ", kMaxSetAside, " damaged files lie beside it already"));
}

absl::Status CheckPivotDirectory(const std::string& path) {
  const std::string directory = Directory(path);
  const File opened(directory, O_RDONLY | O_DIRECTORY);
  if (!opened.ok()) return Errno(directory, "open the directory");
  if (access(directory.c_str(), W_OK | X_OK) != 0)
    return Errno(directory, "write to the directory");
  return absl::OkStatus();
}

}  // namespace structkv::session
