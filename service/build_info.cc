#include "service/build_info.h"

#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "grpcpp/grpcpp.h"
#include "kernels/backend_registry.h"
#include "openssl/crypto.h"
#include "service/revision.h"
#include "service/rpc/version.h"

namespace structkv {

std::string BuildRevision() { return kRevision; }

std::string BuildInfo() {
  std::vector<std::string> backends;
  for (std::string_view name : BackendNames()) backends.emplace_back(name);
#ifdef STRUCTKV_HAVE_CUDA
  const std::string cuda =
      absl::StrCat("CUDA ", STRUCTKV_CUDA_VERSION, ", for ", STRUCTKV_CUDA_ARCHITECTURES);
  constexpr char kNccl[] = "NCCL, loaded at the start (--nccl-library)";
#else
  const std::string cuda = "none: built without CUDA";
  constexpr char kNccl[] = "none: built without CUDA";
#endif
  return absl::StrCat("structkv-server ", rpc::kVersion,              //
                      "\nrevision: ", kRevision,                      //
                      "\nbackends: ", absl::StrJoin(backends, ", "),  //
                      "\ncuda: ", cuda,                               //
                      "\nnccl: ", kNccl,                              //
                      "\nlibraries: gRPC ", grpc::Version(), ", ",    //
                      OpenSSL_version(OPENSSL_VERSION),               //
                      "\ncompiler: ", STRUCTKV_COMPILER, ", ", STRUCTKV_BUILD_TYPE);
}

}  // namespace structkv
