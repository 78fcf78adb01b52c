// Any `open`: decoded, validated, planned and opened. Nothing may crash, overflow, or reserve more
// than the server has.
#include <cmath>
#include <memory>
#include <string>

#include "kernels/backend_registry.h"
#include "service/rpc/method_codec.h"
#include "service/rpc/open_decoder.h"
#include "service/rpc/rotary_codec.h"
#include "service/session/session.h"
#include "service/session/session_plan.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/fuzz/quiet_protobuf.h"

namespace structkv {
namespace {

constexpr int64_t kMessageBytes = 1 << 20;
constexpr int64_t kBudgetBytes = 64 << 20;

session::SessionManager& Sessions() {
  static auto* const sessions = new session::SessionManager(
      {.memory_budget_bytes = kBudgetBytes, .threads = 1}, *CreateBackend("reference"));
  return *sessions;
}

// What holds for every valid spec.
void CheckSpec(const engine::PromptSpec& spec) {
  const int64_t tokens = spec.prompt_tokens;
  for (int64_t layer = 0; layer < spec.geometry.layers; ++layer) {
    FUZZ_CHECK(spec.kept_tokens(layer) >= (spec.has_input(layer) ? 1 : 0));
    FUZZ_CHECK(spec.kept_tokens(layer) <= spec.largest_kept_tokens());
    FUZZ_CHECK(spec.largest_kept_tokens() <= tokens);
  }
  FUZZ_CHECK(spec.skeleton_tokens() >= 0 && spec.skeleton_tokens() <= tokens);
  FUZZ_CHECK(spec.window_rows() >= 0 && spec.window_rows() <= tokens);
  const engine::MemoryPlan plan = engine::PlanMemory(spec, Sessions().backend());
  FUZZ_CHECK(plan.layer_input_bytes >= 0 && plan.layer_output_bytes >= 0);
  FUZZ_CHECK(plan.state_bytes > 0 && plan.scratch_bytes >= 0);
  int64_t input = 0;
  for (engine::InputTensor tensor : spec.RequiredTensors()) {
    FUZZ_CHECK(spec.InputBytes(tensor) > 0);
    input += spec.InputBytes(tensor);
  }
  FUZZ_CHECK(plan.layer_input_bytes == input);
  const v1::Opened opened = rpc::EncodeOpened(spec);
  FUZZ_CHECK(opened.kept_tokens_size() == spec.geometry.layers);
  // The parameters in force ask for themselves again.
  const auto again = rpc::DecodeMethod(opened.method(), spec.geometry.layers, opened.statistic());
  FUZZ_CHECK(again.ok());
  FUZZ_CHECK(rpc::EncodeMethod(*again).SerializeAsString() == opened.method().SerializeAsString());
  FUZZ_CHECK(spec.rotary.has_value() == opened.has_rotary());
  if (!spec.rotary.has_value()) return;
  for (int64_t length : {spec.prompt_tokens, spec.largest_kept_tokens()}) {
    for (float frequency : method::InverseFrequencies(*spec.rotary, length)) {
      FUZZ_CHECK(std::isfinite(frequency) && frequency >= 0);
    }
  }
  const auto rotary = rpc::DecodeRotary(opened.rotary(), spec.geometry.key_dim);
  FUZZ_CHECK(rotary.ok());
  FUZZ_CHECK(rpc::EncodeRotary(*rotary).SerializeAsString() == opened.rotary().SerializeAsString());
}

void CheckOpen(const v1::Open& open) {
  const absl::StatusOr<rpc::OpenRequest> request = rpc::DecodeOpen(open, kMessageBytes);
  if (!request.ok()) {
    FUZZ_CHECK(absl::IsInvalidArgument(request.status()));
    FUZZ_CHECK(!request.status().message().empty());
    return;
  }
  session::SessionManager& sessions = Sessions();
  const session::SessionRequest wanted = {
      .spec = request->spec,
      .layers_in_flight = request->layers_in_flight,
      .idempotency_key = request->idempotency_key,
      .max_message_bytes = kMessageBytes,
  };
  const absl::Status valid = engine::ValidateSpec(request->spec, sessions.options().limits,
                                                  sessions.backend().capabilities());
  const absl::StatusOr<std::shared_ptr<session::Session>> session = sessions.Open(wanted);
  FUZZ_CHECK(sessions.budget().reserved_bytes() <= kBudgetBytes);
  if (!valid.ok()) {
    FUZZ_CHECK(absl::IsInvalidArgument(valid));
    FUZZ_CHECK(session.status() == valid);
    return;
  }
  CheckSpec(request->spec);
  const absl::StatusOr<session::SessionPlan> plan =
      session::PlanSession(wanted, sessions.backend());
  FUZZ_CHECK(plan.ok());
  FUZZ_CHECK(session.ok() == (plan->reserved_bytes <= kBudgetBytes));
  if (!session.ok()) return;
  FUZZ_CHECK(sessions.budget().reserved_bytes() == plan->reserved_bytes);
  FUZZ_CHECK((*session)->reserved_bytes() == plan->reserved_bytes);
}

}  // namespace
}  // namespace structkv

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  structkv::v1::Open open;
  if (!open.ParseFromArray(data, static_cast<int>(size))) return 0;
  structkv::CheckOpen(open);
  FUZZ_CHECK(structkv::Sessions().budget().reserved_bytes() == 0);
  FUZZ_CHECK(structkv::Sessions().active_sessions() == 0);
  return 0;
}
