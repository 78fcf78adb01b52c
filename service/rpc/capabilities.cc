#include "service/rpc/capabilities.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/backend_registry.h"
#include "service/rpc/open_decoder.h"
#include "service/rpc/version.h"

namespace structkv::rpc {
namespace {

void AddBackends(const session::SessionManager& sessions, v1::GetCapabilitiesResponse* response) {
  const Backend& used = sessions.backend();
  v1::BackendInfo* first = response->add_backends();
  first->set_name(std::string(used.name()));
  first->add_devices(used.device());
  first->add_devices(absl::StrCat(sessions.threads(), " threads"));
  for (std::string_view name : BackendNames()) {
    if (name != used.name()) response->add_backends()->set_name(std::string(name));
  }
}

}  // namespace

v1::GetCapabilitiesResponse MakeCapabilities(const session::SessionManager& sessions,
                                             int64_t max_message_bytes,
                                             const std::string& region_socket) {
  v1::GetCapabilitiesResponse response;
  response.set_version(kVersion);
  AddBackends(sessions, &response);
  const BackendCapabilities& backend = sessions.backend().capabilities();
  for (DType dtype : backend.dtypes) response.add_dtypes(EncodeDType(dtype));
  for (Layout layout : backend.layouts) {
    response.add_layouts(layout == Layout::kHeadTokenDim ? v1::LAYOUT_HEAD_TOKEN_DIM
                                                         : v1::LAYOUT_TOKEN_HEAD_DIM);
  }
  const google::protobuf::OneofDescriptor* kinds =
      v1::Method::descriptor()->FindOneofByName("kind");
  for (int i = 0; i < kinds->field_count(); ++i) response.add_methods(kinds->field(i)->name());
  for (v1::Statistic statistic : {v1::STATISTIC_NONE, v1::STATISTIC_WINDOW_QUERIES,
                                  v1::STATISTIC_SALIENCY, v1::STATISTIC_SALIENCY_PER_KV_HEAD}) {
    response.add_statistics(statistic);
  }
  for (v1::PivotMode mode : {v1::PIVOT_MODE_EXACT, v1::PIVOT_MODE_FIXED, v1::PIVOT_MODE_ONLINE,
                             v1::PIVOT_MODE_PROFILED}) {
    response.add_pivot_modes(mode);
  }
  for (v1::RopeType type : {v1::ROPE_TYPE_DEFAULT, v1::ROPE_TYPE_LINEAR, v1::ROPE_TYPE_DYNAMIC,
                            v1::ROPE_TYPE_YARN, v1::ROPE_TYPE_LLAMA3}) {
    response.add_rope_types(type);
  }
  response.add_transports(std::string(transport::KindName(transport::Kind::kInline)));
  for (const auto& [kind, grant] : sessions.options().transports) {
    std::string name(transport::KindName(kind));
    if (grant.ok()) {
      response.add_transports(std::move(name));
    } else {
      response.add_missing_transports(absl::StrCat(name, ": ", grant.status().message()));
    }
  }
  response.set_region_socket(region_socket);

  v1::DimRange* dims = response.mutable_key_dims();
  dims->set_min(static_cast<uint32_t>(backend.min_dim));
  dims->set_max(static_cast<uint32_t>(backend.max_dim));
  dims->set_step(static_cast<uint32_t>(backend.dim_step));
  for (int64_t extra : backend.extra_dims) dims->add_extra(static_cast<uint32_t>(extra));

  if (backend.paged) {
    v1::DimRange* blocks = response.mutable_block_tokens();
    blocks->set_min(static_cast<uint32_t>(engine::kBlockTokensStep));
    blocks->set_max(static_cast<uint32_t>(engine::kMaxBlockTokens));
    blocks->set_step(static_cast<uint32_t>(engine::kBlockTokensStep));
  }

  const session::SessionLimits options = sessions.limits();
  v1::Limits* limits = response.mutable_limits();
  limits->set_max_prompt_tokens(static_cast<uint32_t>(options.prompt.max_prompt_tokens));
  limits->set_max_layers(static_cast<uint32_t>(options.prompt.max_layers));
  limits->set_max_heads(static_cast<uint32_t>(options.prompt.max_heads));
  limits->set_max_window_tokens(static_cast<uint32_t>(options.prompt.max_window));
  limits->set_max_message_bytes(static_cast<uint64_t>(max_message_bytes));
  limits->set_max_sessions(static_cast<uint32_t>(options.max_sessions));
  const int64_t budget = sessions.budget().limit_bytes();
  limits->set_memory_budget_bytes(static_cast<uint64_t>(budget));
  limits->set_memory_available_bytes(
      static_cast<uint64_t>(budget - sessions.budget().reserved_bytes()));
  const session::HeldCaches& held = sessions.held_caches();
  if (held.CheckEnabled().ok()) {
    limits->set_hold_budget_bytes(static_cast<uint64_t>(held.budget().limit_bytes()));
    limits->set_hold_available_bytes(
        static_cast<uint64_t>(held.budget().limit_bytes() - held.budget().reserved_bytes()));
    const auto millis = [](absl::Duration lease) {
      return static_cast<uint64_t>(absl::ToInt64Milliseconds(lease));
    };
    limits->set_default_hold_lease_millis(millis(held.options().default_lease));
    limits->set_max_hold_lease_millis(millis(held.options().max_lease));
  }
  return response;
}

v1::GetLoadResponse MakeLoad(const session::SessionManager& sessions) {
  v1::GetLoadResponse load;
  load.set_reserved_bytes(static_cast<uint64_t>(sessions.budget().reserved_bytes()));
  load.set_limit_bytes(static_cast<uint64_t>(sessions.budget().limit_bytes()));
  const session::HeldCaches& held = sessions.held_caches();
  if (held.CheckEnabled().ok()) {
    load.set_hold_reserved_bytes(static_cast<uint64_t>(held.budget().reserved_bytes()));
    load.set_hold_limit_bytes(static_cast<uint64_t>(held.budget().limit_bytes()));
  }
  load.set_active_sessions(static_cast<uint32_t>(sessions.active_sessions()));
  load.set_max_sessions(static_cast<uint32_t>(sessions.limits().max_sessions));
  load.set_draining(sessions.draining());
  return load;
}

}  // namespace structkv::rpc
