// Prompts whose tensors lie in memory of a GPU: CUDA IPC and NCCL, each beside its floor.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "tests/bench/wire_route.h"

namespace structkv::bench {

struct GpuOptions {
  std::string server;  // a program that computes on GPUs, and flags, separated by spaces
  std::string cuda_library = "libcuda.so.1";  // empty: this program itself
  std::string nccl_library = "libnccl.so.2";
  int gpu = 0;       // the server's, and the client's over CUDA IPC
  int nccl_gpu = 1;  // the client's over NCCL
};

// A route, or why there is none.
struct GpuRoute {
  std::string name;
  std::unique_ptr<Route> route;
  std::string skipped;
};

// A server on `gpu`, and what is needed to run prompts through it.
class GpuRoutes {
 public:
  // `load` outlives the object. Where a route can be made a prompt went over it.
  GpuRoutes(const GpuOptions& options, const RouteLoad* load);
  ~GpuRoutes();

  std::vector<GpuRoute>& routes() { return routes_; }

 private:
  class Server;

  absl::StatusOr<std::unique_ptr<Route>> MakeCudaIpc() const;
  absl::StatusOr<std::unique_ptr<Route>> MakeNccl() const;
  // With tensors in an arena of that GPU.
  absl::StatusOr<RouteSetup> OnGpu(int gpu) const;
  std::unique_ptr<cli::Compressor> Compressor() const;

  const GpuOptions options_;
  const RouteLoad* const load_;
  std::unique_ptr<Server> server_;
  std::vector<GpuRoute> routes_;
};

}  // namespace structkv::bench
