// How a server gets to know a region.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "structkv/region.h"
#include "structkv/v1/region.pb.h"

namespace structkv::client::internal {

// A server, as regions know it.
struct RegionServer {
  std::shared_ptr<grpc::Channel> channel;
  std::string socket;  // path of its region socket, as it says
  std::string tenant;  // as the streams' metadata say
  // GetCapabilitiesResponse.tenant, where a certificate or a token decides; otherwise empty.
  std::string caller;
  std::weak_ptr<const void> client;  // ends with the client whose channel it is
  bool own_process = false;          // ClientOptions.own_process

  // Equal where a registration of a region of that kind counts for both. A descriptor goes to the
  // socket; of the others nothing but the channel says whose they are.
  std::string key(RegionKind kind) const;
};

// A region's registration with one server, which ends with the object.
class Registration {
 public:
  virtual ~Registration() = default;
  const std::string& handle() const { return handle_; }
  // False once the server has dropped it, or is gone.
  virtual bool holds() = 0;

 protected:
  explicit Registration(std::string handle) : handle_(std::move(handle)) {}

 private:
  const std::string handle_;
};

// Over the region socket, whose connection the registration keeps.
//   UNAVAILABLE  the socket cannot be reached, or does not answer; its path is named
//   and what the server answers (region.proto)
absl::StatusOr<std::unique_ptr<Registration>> RegisterDescriptor(const RegionServer& server,
                                                                 const RegionOptions& options,
                                                                 int descriptor,
                                                                 absl::Time deadline);

// Gives the unnamed file of /dev/shm behind `descriptor` a name and registers that; a thread renews
// its lease.
absl::StatusOr<std::unique_ptr<Registration>> RegisterNamed(const RegionServer& server,
                                                            const RegionOptions& options,
                                                            int descriptor, absl::Time deadline);

// Of memory of a GPU, which is kept until the server has closed it; a thread renews its lease.
absl::StatusOr<std::unique_ptr<Registration>> RegisterGpu(const RegionServer& server,
                                                          const RegionOptions& options,
                                                          const v1::CudaIpcMemory& exported,
                                                          std::shared_ptr<const void> memory,
                                                          absl::Time deadline);

}  // namespace structkv::client::internal
