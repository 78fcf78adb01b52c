// Which limit refused a prompt at open, so that refusals can be counted by it.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/string_view.h"

namespace structkv::session {

inline constexpr char kLimitPayload[] = "structkv/limit";

// The options that are such limits, as labels of metrics.
inline constexpr absl::string_view kMaxSessionsLimit = "max_sessions";
inline constexpr absl::string_view kMemoryBudgetLimit = "memory_budget";
inline constexpr absl::string_view kHoldBudgetLimit = "hold_budget";
inline constexpr absl::string_view kDeviceMemoryLimit = "device_memory";
inline constexpr absl::string_view kTenantMaxSessionsLimit = "tenant_max_sessions";
inline constexpr absl::string_view kTenantMemoryLimit = "tenant_memory";
inline constexpr absl::string_view kTenantHoldBudgetLimit = "tenant_hold_budget";
inline constexpr absl::string_view kLimits[] = {
    kMaxSessionsLimit,       kMemoryBudgetLimit, kHoldBudgetLimit,      kDeviceMemoryLimit,
    kTenantMaxSessionsLimit, kTenantMemoryLimit, kTenantHoldBudgetLimit};

// `status` is not OK.
inline absl::Status MarkLimit(absl::Status status, absl::string_view limit) {
  status.SetPayload(kLimitPayload, absl::Cord(limit));
  return status;
}

// Empty: another reason.
inline std::string LimitOf(const absl::Status& status) {
  const auto limit = status.GetPayload(kLimitPayload);
  return limit.has_value() ? std::string(*limit) : "";
}

}  // namespace structkv::session
