#include "tests/testing/shared_region.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

namespace structkv::testkit {
namespace {

constexpr uint64_t kAlignment = 64;

uint64_t RoundUp(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::string PathOf(const std::string& name) { return "/dev/shm/" + name; }

}  // namespace

SharedFile::SharedFile(int fd, uint64_t size, std::string name)
    : fd_(fd), size_(size), name_(std::move(name)) {
  void* data = fd < 0 ? MAP_FAILED : mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) std::abort();
  data_ = static_cast<char*>(data);
}

std::unique_ptr<SharedFile> SharedFile::WithSeals(uint64_t size, int seals) {
  const int fd = memfd_create("structkv-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(size)) != 0) std::abort();
  if (seals != 0 && fcntl(fd, F_ADD_SEALS, seals) != 0) std::abort();
  return std::unique_ptr<SharedFile>(new SharedFile(fd, size, ""));
}

std::unique_ptr<SharedFile> SharedFile::Sealed(uint64_t size) {
  return WithSeals(size, F_SEAL_SHRINK);
}

std::unique_ptr<SharedFile> SharedFile::Named(const std::string& name, uint64_t size) {
  const int fd = open(PathOf(name).c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0 || flock(fd, LOCK_EX) != 0 || ftruncate(fd, static_cast<off_t>(size)) != 0) {
    std::abort();
  }
  return std::unique_ptr<SharedFile>(new SharedFile(fd, size, name));
}

SharedFile::~SharedFile() {
  munmap(data_, size_);
  close(fd_);
  if (!name_.empty()) unlink(PathOf(name_).c_str());
}

bool SharedFile::Truncate(uint64_t size) { return ftruncate(fd_, static_cast<off_t>(size)) == 0; }

bool SharedFile::HasName() const {
  struct stat status = {};
  return stat(PathOf(name_).c_str(), &status) == 0;
}

RegionConnection::RegionConnection(const std::string& path) {
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  std::strncpy(name.sun_path, path.c_str(), sizeof(name.sun_path) - 1);
  fd_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (connect(fd_, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) != 0) Close();
}

RegionConnection::~RegionConnection() { Close(); }

void RegionConnection::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

bool RegionConnection::Send(const std::string& bytes, int fd, int files) {
  std::string data = bytes;
  iovec part = {data.data(), data.size()};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  std::vector<int> descriptors(static_cast<size_t>(files), fd);
  const size_t bytes_of_files = descriptors.size() * sizeof(int);
  std::vector<char> control(CMSG_SPACE(bytes_of_files));
  if (files > 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(bytes_of_files);
    std::memcpy(CMSG_DATA(header), descriptors.data(), bytes_of_files);
  }
  return sendmsg(fd_, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
}

bool RegionConnection::Receive(v1::RegisterDescriptorResponse* response) {
  std::array<char, 4096> bytes;
  const ssize_t size = recv(fd_, bytes.data(), bytes.size(), 0);
  return size > 0 && response->ParseFromArray(bytes.data(), static_cast<int>(size));
}

v1::RegisterDescriptorResponse RegionConnection::Register(const SharedFile& file, bool writable,
                                                          uint64_t lease_millis,
                                                          const std::string& tenant) {
  v1::RegisterDescriptorRequest request;
  request.set_size_bytes(file.size());
  request.set_writable(writable);
  request.set_lease_millis(lease_millis);
  request.set_tenant(tenant);
  v1::RegisterDescriptorResponse response;
  if (!Send(request.SerializeAsString(), file.fd()) || !Receive(&response)) {
    response.set_code(static_cast<uint32_t>(grpc::StatusCode::UNAVAILABLE));
  }
  return response;
}

uint64_t ResultRangeBytes(const PromptData& data) {
  const v1::Open& open = data.open();
  if (data.effective().plan) return 0;
  const v1::ModelGeometry& geometry = open.geometry();
  v1::Open own = open;
  if (open.has_shard_group()) {
    own.mutable_geometry()->set_kv_head_count(open.shard_group().kv_heads().count());
  }
  const uint64_t row = OutputRows(own, data.effective().largest) * ElementBytes(open.dtype());
  const uint64_t values = geometry.values_in_keys() ? 0 : data.effective().value_dim;
  return (RoundUp(row * geometry.key_dim()) + RoundUp(row * values)) * geometry.layer_count();
}

uint64_t RangedPrompt::BytesFor(const PromptData& data) {
  constexpr uint64_t kMostTensors = 16;  // of a layer
  return data.total_bytes() + data.layers() * kMostTensors * kAlignment + ResultRangeBytes(data) +
         kAlignment;
}

RangedPrompt::RangedPrompt(const PromptData& data, SharedFile* file, std::string handle,
                           bool results)
    : file_(*file), handle_(std::move(handle)) {
  const uint64_t bytes = ResultRangeBytes(data);
  if (!results || bytes == 0) return;
  results_.set_offset_bytes((file_.size() - bytes) / kAlignment * kAlignment);
  results_.set_size_bytes(bytes);
}

v1::Open RangedPrompt::Open(v1::Open open) const {
  open.add_transports(v1::TRANSPORT_SHARED_MEMORY);
  open.add_regions(handle_);
  if (results_.size_bytes() > 0) *open.mutable_result_range() = results_;
  return open;
}

v1::CompressRequest RangedPrompt::Put(const v1::CompressRequest& message, bool keys_and_values) {
  v1::CompressRequest put = message;
  put.mutable_pieces()->clear_pieces();
  // Pieces of one tensor together, in the order of their first ones.
  std::map<std::pair<uint32_t, v1::Tensor>, size_t> places;
  std::vector<v1::TensorPiece> tensors;
  for (const v1::TensorPiece& piece : message.pieces().pieces()) {
    const auto [place, fresh] = places.try_emplace({piece.layer(), piece.tensor()}, tensors.size());
    if (fresh) {
      tensors.push_back(piece);
      tensors.back().set_offset_bytes(0);
      tensors.back().clear_data();
    }
    std::string* whole = tensors[place->second].mutable_data();
    whole->resize(std::max(whole->size(), piece.offset_bytes() + piece.data().size()));
    whole->replace(piece.offset_bytes(), piece.data().size(), piece.data());
  }
  for (v1::TensorPiece& tensor : tensors) {
    const bool in_place =
        tensor.tensor() == v1::TENSOR_KEYS || tensor.tensor() == v1::TENSOR_VALUES;
    if (in_place || !keys_and_values) {
      const std::string data = tensor.data();
      if (used_ + data.size() > file_.size() - results_.size_bytes()) std::abort();
      std::memcpy(file_.data() + used_, data.data(), data.size());
      tensor.mutable_range()->set_offset_bytes(used_);
      tensor.mutable_range()->set_size_bytes(data.size());
      used_ += RoundUp(data.size());
    }
    *put.mutable_pieces()->add_pieces() = std::move(tensor);
  }
  return put;
}

Outcome RangedPrompt::Get(Outcome outcome) const {
  for (v1::CompressResponse& response : outcome.responses) {
    if (!response.has_layer()) continue;
    for (v1::TensorPiece& piece : *response.mutable_layer()->mutable_pieces()) {
      if (!piece.has_range()) continue;
      const v1::RegionRange range = piece.range();
      piece.set_data(file_.data() + range.offset_bytes(), range.size_bytes());
    }
  }
  return outcome;
}

}  // namespace structkv::testkit
