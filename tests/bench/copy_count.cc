#include "tests/bench/copy_count.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

namespace structkv::bench {

Copies& Copies::operator+=(const Copies& more) {
  copied += more.copied;
  sent += more.sent;
  received += more.received;
  return *this;
}

Copies operator-(const Copies& now, const Copies& before) {
  return {now.copied - before.copied, now.sent - before.sent, now.received - before.received};
}

CopyPage* MapCopyPage() {
  const char* const path = std::getenv(kCopyCountFile);  // NOLINT(concurrency-mt-unsafe)
  if (path == nullptr) return nullptr;
  const int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return nullptr;
  void* const page = mmap(nullptr, sizeof(CopyPage), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return page == MAP_FAILED ? nullptr : static_cast<CopyPage*>(page);
}

std::optional<Copies> CountedCopies() {
  static const CopyPage* const page = MapCopyPage();
  if (page == nullptr) return std::nullopt;
  return Copies{page->copied, page->sent, page->received};
}

CopyMeter::~CopyMeter() {
  if (!before_.has_value()) return;
  if (!total_->has_value()) total_->emplace();
  **total_ += *CountedCopies() - *before_;
}

}  // namespace structkv::bench
