// Memory that a test's client shares with the server, and the client's end of the region socket:
// the bare protocol of region.proto. Shares nothing with client/cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "structkv/v1/region.pb.h"
#include "tests/testing/call.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

// A file of a tmpfs, mapped. Unmapped, closed and, where it has a name, removed when destroyed.
class SharedFile {
 public:
  // A memfd with F_SEAL_SHRINK.
  static std::unique_ptr<SharedFile> Sealed(uint64_t size);
  // A memfd with these seals, which may be none.
  static std::unique_ptr<SharedFile> WithSeals(uint64_t size, int seals);
  // /dev/shm/`name`, held with flock(LOCK_EX).
  static std::unique_ptr<SharedFile> Named(const std::string& name, uint64_t size);
  ~SharedFile();
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;

  int fd() const { return fd_; }
  char* data() const { return data_; }
  uint64_t size() const { return size_; }
  // Makes the file shorter; the mapping stays.
  bool Truncate(uint64_t size);
  // Whether the name is still there.
  bool HasName() const;

 private:
  SharedFile(int fd, uint64_t size, std::string name);

  int fd_;
  char* data_ = nullptr;
  uint64_t size_;
  std::string name_;
};

// A connection to the region socket. Closed when destroyed.
class RegionConnection {
 public:
  explicit RegionConnection(const std::string& path);
  ~RegionConnection();
  RegionConnection(const RegionConnection&) = delete;
  RegionConnection& operator=(const RegionConnection&) = delete;

  bool connected() const { return fd_ >= 0; }
  void Close();
  // Sends a packet with `files` descriptors, all of them `fd`.
  bool Send(const std::string& bytes, int fd, int files = 1);
  // Waits for an answer; false where the server closed.
  bool Receive(v1::RegisterDescriptorResponse* response);
  v1::RegisterDescriptorResponse Register(const SharedFile& file, bool writable = true,
                                          uint64_t lease_millis = 0,
                                          const std::string& tenant = "");

 private:
  int fd_ = -1;
};

// A prompt whose tensors lie in one region: each from the next multiple of 64 bytes on, and behind
// them the results.
class RangedPrompt {
 public:
  // Room for the tensors of `data`, and their results where `results`.
  static uint64_t BytesFor(const PromptData& data);
  // `file` outlives the object; its region is `handle`.
  RangedPrompt(const PromptData& data, SharedFile* file, std::string handle, bool results);

  // Asks for shared memory, in this region.
  v1::Open Open(v1::Open open) const;
  // Puts the data of a message's pieces into the region, each tensor as a whole, and its range in
  // their place; keys and values alone where `keys_and_values`.
  v1::CompressRequest Put(const v1::CompressRequest& message, bool keys_and_values = false);
  // The answers with data in the place of ranges.
  Outcome Get(Outcome outcome) const;
  const v1::RegionRange& results() const { return results_; }

 private:
  SharedFile& file_;
  const std::string handle_;
  uint64_t used_ = 0;
  v1::RegionRange results_;
};

// Bytes of the kept rows of all layers, as `Open.result_range` counts them.
uint64_t ResultRangeBytes(const PromptData& data);

}  // namespace structkv::testkit
