// The last prompts and errors, for the status page.
#pragma once

#include <cstddef>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "service/rpc/stream_observer.h"

namespace structkv::admin {

// Thread-safe. Some 200 KiB at most for prompts of 32 layers.
class Recent {
 public:
  // So many of each are kept; the oldest go first.
  static constexpr size_t kPrompts = 32;
  static constexpr size_t kErrors = 64;

  struct Prompt {
    absl::Time ended;
    rpc::PromptReport report;
    absl::Status status;
  };
  struct Error {
    absl::Time time;
    std::string what;  // "prompt ID", "fetch"
    absl::Status status;
  };

  void Add(const rpc::PromptReport& prompt, const absl::Status& status);
  void Add(const rpc::FetchReport& fetch, const absl::Status& status);

  // The newest first; of prompts those that had a layer answered.
  std::vector<Prompt> prompts() const;
  std::vector<Error> errors() const;

 private:
  void AddError(std::string what, const absl::Status& status);

  mutable std::mutex mutex_;
  std::deque<Prompt> prompts_;  // the newest first, as the errors
  std::deque<Error> errors_;
};

}  // namespace structkv::admin
