#include "service/transport/bus_guard.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <mutex>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace structkv::transport {
namespace {

// The handler reads this table without a lock, which is enough: a fault lies in a range that is in
// use, and the entry of such a range does not change. Of other entries it may see a mixture of old
// and new, but `begin` twice the same means a range that is mapped, and ranges that are mapped do
// not overlap.
struct Slot {
  std::atomic<uintptr_t> begin{0};  // 0: free; published last
  std::atomic<size_t> size{0};
  std::atomic<bool> hit{false};
};
Slot slots[BusGuard::kMaxRanges];
std::atomic<int> slots_used{0};  // all in use are below
std::mutex table_mutex;          // of those that add and remove
struct sigaction previous;

// Replaces the whole range, not the page alone: what reads it would fault once for each page, and
// pages of huge ones cannot be replaced. mmap is not on POSIX's list of what a handler may call,
// but the bare system call takes no lock of this process and allocates nothing in it, and the
// interrupted code is one that touches the range.
bool Replace(Slot& slot, uintptr_t begin, size_t size) {
  slot.hit.store(true);  // before others can read zeros; where this fails the process ends
  const int saved = errno;
  const long mapped = syscall(SYS_mmap, begin, size, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  errno = saved;
  return static_cast<uintptr_t>(mapped) == begin;
}

void Handle(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const int used = slots_used.load(std::memory_order_acquire);
  for (int i = 0; i < used; ++i) {
    const uintptr_t begin = slots[i].begin.load(std::memory_order_acquire);
    const size_t size = slots[i].size.load(std::memory_order_acquire);
    if (begin == 0 || address < begin || address - begin >= size) continue;
    if (slots[i].begin.load(std::memory_order_acquire) != begin) continue;
    if (Replace(slots[i], begin, size)) return;
  }
  // Not ours: as it would have been without this handler.
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else {
    sigaction(SIGBUS, &previous, nullptr);  // the access is tried again, and ends the process
  }
}

void Install() {
  struct sigaction action = {};
  action.sa_sigaction = Handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &previous);
}

}  // namespace

absl::StatusOr<BusGuard> BusGuard::Watch(void* data, size_t size) {
  static std::once_flag once;
  std::call_once(once, Install);
  const std::lock_guard lock(table_mutex);
  for (int i = 0; i < kMaxRanges; ++i) {
    Slot& slot = slots[i];
    if (slot.begin.load() != 0) continue;
    slot.hit.store(false);
    slot.size.store(size);
    if (i >= slots_used.load()) slots_used.store(i + 1);
    slot.begin.store(reinterpret_cast<uintptr_t>(data), std::memory_order_release);
    return BusGuard(i);
  }
  return absl::ResourceExhaustedError(
      absl::StrCat(kMaxRanges, " regions are mapped, and no more may be"));
}

BusGuard::~BusGuard() {
  if (slot_ < 0) return;
  const std::lock_guard lock(table_mutex);
  slots[slot_].begin.store(0);
}

bool BusGuard::hit() const { return slots[slot_].hit.load(); }

}  // namespace structkv::transport
