#include "service/rpc/region_host.h"

#include <algorithm>
#include <thread>
#include <utility>  // before Asio: its 1.74 needs it

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "boost/asio/io_context.hpp"
#include "boost/asio/steady_timer.hpp"
#include "service/transport/region_files.h"

namespace structkv::rpc {

class RegionHost::Impl {
 public:
  Impl(const RegionHostOptions& options, std::shared_ptr<transport::RegionRegistry> registry)
      : options_(options), registry_(std::move(registry)), timer_(io_) {}

  ~Impl() {
    io_.stop();
    if (thread_.joinable()) thread_.join();
    socket_.reset();
  }

  absl::Status Start() {
    absl::StatusOr<std::unique_ptr<RegionSocket>> socket =
        RegionSocket::Listen(options_.socket, registry_.get(), &io_);
    if (!socket.ok()) return socket.status();
    socket_ = *std::move(socket);
    Tick();
    thread_ = std::thread([this] { io_.run(); });
    return absl::OkStatus();
  }

 private:
  // A quarter of the shortest lease, so that one ends little later than it should.
  static constexpr std::chrono::milliseconds kTick{25};

  void Tick() {
    registry_->Expire();
    SweepIfDue();
    timer_.expires_after(kTick);
    timer_.async_wait([this](const boost::system::error_code& error) {
      if (!error) Tick();
    });
  }

  void SweepIfDue() {
    const absl::Duration lease = options_.regions.lease;
    const auto now = std::chrono::steady_clock::now();
    if (now < next_sweep_) return;
    next_sweep_ = now + absl::ToChronoNanoseconds(lease / 2);
    const int removed = transport::SweepNames(options_.regions.directory, lease);
    if (removed == 0 || options_.warn == nullptr) return;
    options_.warn(absl::StrCat("removed ", removed, " files of ", options_.regions.directory,
                               " whose creators are gone"));
  }

  const RegionHostOptions options_;
  const std::shared_ptr<transport::RegionRegistry> registry_;
  boost::asio::io_context io_{1};
  boost::asio::steady_timer timer_;
  std::chrono::steady_clock::time_point next_sweep_;
  std::unique_ptr<RegionSocket> socket_;
  std::thread thread_;
};

RegionHost::RegionHost(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
RegionHost::~RegionHost() = default;

absl::StatusOr<std::unique_ptr<RegionHost>> RegionHost::Start(
    const RegionHostOptions& options, std::shared_ptr<transport::RegionRegistry> registry) {
  auto impl = std::make_unique<Impl>(options, std::move(registry));
  if (absl::Status started = impl->Start(); !started.ok()) return started;
  return std::unique_ptr<RegionHost>(new RegionHost(std::move(impl)));
}

}  // namespace structkv::rpc
