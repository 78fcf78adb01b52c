#include "service/transport/nccl/reclaimer.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

namespace structkv::nccl {

struct Reclaimer::Shared {
  std::shared_ptr<const Api> api;
  DeviceApi device_api;
  int device;
  std::function<void(const std::vector<PeerId>&)> on_gone;

  std::mutex mutex;
  std::condition_variable ended;
  int threads = 0;

  void GiveBack(std::vector<Remains> group);
};

Reclaimer::Reclaimer(std::shared_ptr<const Api> api, const DeviceApi& device_api, int device,
                     std::function<void(const std::vector<PeerId>&)> on_gone)
    : shared_(std::make_shared<Shared>()) {
  shared_->api = std::move(api);
  shared_->device_api = device_api;
  shared_->device = device;
  shared_->on_gone = std::move(on_gone);
}

void Reclaimer::Take(std::vector<Remains> group) {
  if (group.empty()) return;
  {
    std::lock_guard lock(shared_->mutex);
    ++shared_->threads;
  }
  std::thread([shared = shared_, group = std::move(group)]() mutable {
    shared->GiveBack(std::move(group));
    std::lock_guard lock(shared->mutex);
    --shared->threads;
    shared->ended.notify_all();
  }).detach();
}

bool Reclaimer::WaitUntilEmpty(absl::Duration limit) {
  std::unique_lock lock(shared_->mutex);
  return shared_->ended.wait_for(lock, absl::ToChronoNanoseconds(limit),
                                 [this] { return shared_->threads == 0; });
}

// Errors change nothing: there is no other way to give a communicator back.
void Reclaimer::Shared::GiveBack(std::vector<Remains> group) {
  (void)device_api.set_device(device);
  const Functions& call = api->call();
  const bool abort = group.front().abort;
  if (abort) (void)call.group_start();
  std::vector<PeerId> peers;
  for (const Remains& remains : group) {
    peers.push_back(remains.peer);
    if (remains.comm == nullptr) continue;
    (void)(abort ? call.comm_abort(remains.comm) : call.comm_destroy(remains.comm));
  }
  if (abort) (void)call.group_end();
  for (const Remains& remains : group) {
    if (remains.stream != nullptr) device_api.destroy_stream(remains.stream);
  }
  group.clear();
  on_gone(peers);
}

}  // namespace structkv::nccl
