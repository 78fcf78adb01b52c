#include "options.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "error.h"
#include "message.h"
#include "region.h"
#include "results.h"
#include "shapes.h"
#include "tensor.h"

namespace structkv::python {
namespace {

void ReadSeconds(nb::handle options, const char* name, absl::Duration* value) {
  double seconds = absl::ToDoubleSeconds(*value);
  Read(options, name, &seconds);
  *value = absl::Seconds(seconds);
}

client::RetryPolicy RetryOf(nb::handle options) {
  client::RetryPolicy retry;
  const nb::object policy = options.attr("retry");
  if (policy.is_none()) return retry;
  Read(policy, "max_attempts", &retry.max_attempts);
  ReadSeconds(policy, "initial_backoff", &retry.initial_backoff);
  ReadSeconds(policy, "max_backoff", &retry.max_backoff);
  Read(policy, "multiplier", &retry.multiplier);
  return retry;
}

client::TransportChoice TransportOf(nb::handle options) {
  std::string name = "auto";
  Read(options, "transport", &name);
  if (name == "auto") return client::TransportChoice::kAuto;
  if (name == "inline") return client::TransportChoice::kInline;
  if (name == "shared_memory") return client::TransportChoice::kSharedMemory;
  if (name == "cuda_ipc") return client::TransportChoice::kCudaIpc;
  Throw(absl::InvalidArgumentError(absl::StrCat(
      "transport is '", name, "'; one of auto, inline, shared_memory, cuda_ipc is expected")));
}

std::shared_ptr<client::Arena> ArenaOf(nb::handle options, const char* name) {
  const nb::object arena = nb::getattr(options, name);
  if (arena.is_none()) return nullptr;
  return nb::cast<const ArenaHandle&>(arena).get();
}

void ReadLabels(nb::handle options, client::CallLabels* labels) {
  Read(options, "session_id", &labels->session_id);
  Read(options, "traceparent", &labels->traceparent);
  Read(options, "tracestate", &labels->tracestate);
}

void ReadCall(nb::handle options, client::HeldCallOptions* call) {
  ReadSeconds(options, "timeout", &call->timeout);
  Read(options, "replica", &call->replica);
  Read(options, "metadata", &call->metadata);
  ReadLabels(options, &call->labels);
}

// A function of Python's that the library calls. What it throws is the status of what called it.
using Function = std::shared_ptr<const void>;

Function FunctionOf(nb::handle options, const char* name) {
  nb::object function = nb::getattr(options, name);
  if (function.is_none()) return nullptr;
  return KeepAlive(std::move(function));
}

nb::handle Callable(const Function& function) {
  return static_cast<PyObject*>(const_cast<void*>(function.get()));
}

absl::Status Calling(const char* name, absl::FunctionRef<void()> call) {
  absl::Status status;
  const bool ran = WithGil([&] {
    try {
      call();
    } catch (nb::python_error& error) {
      status = absl::InternalError(
          absl::StrCat(name, ": ", nb::cast<std::string>(nb::str(error.type().attr("__name__"))),
                       ": ", nb::cast<std::string>(nb::str(error.value()))));
    } catch (nb::cast_error&) {
      status = absl::InternalError(absl::StrCat(name, " returned an object of another type"));
    }
  });
  return ran ? status : absl::CancelledError("the interpreter is at its end");
}

client::RowSource RowsOf(Function function, std::shared_ptr<const Prompt> prompt) {
  return [function = std::move(function), prompt = std::move(prompt)](
             const client::RowPull& pull) -> absl::StatusOr<client::PulledRows> {
    client::PulledRows rows;
    absl::Status status = Calling("rows", [&] {
      const nb::tuple pair(Callable(function)(FromPull(pull, *prompt)));
      const auto take = [&](Arguments& arguments, size_t index, v1::Tensor which,
                            const char* name) {
        return arguments.Take(
            pair[index],
            {absl::StrCat("rows: ", name, " of layer ", pull.layer), ElementOf(prompt->open, which),
             OutputShape(prompt->open, prompt->opened, which, pull.kept_tokens), nullptr});
      };
      Arguments arguments;
      rows.keys = take(arguments, 0, v1::TENSOR_KEYS, "keys");
      rows.values = take(arguments, 1, v1::TENSOR_VALUES, "values");
      rows.owner = std::move(arguments).Owner();
    });
    if (!status.ok()) return status;
    return rows;
  };
}

client::ResultAllocator AllocatorOf(Function function) {
  return [function = std::move(function)](uint32_t layer, v1::Tensor tensor,
                                          size_t size) -> absl::StatusOr<client::Bytes> {
    client::Bytes bytes;
    absl::Status status = Calling("allocate", [&] {
      Arguments arguments;
      const absl::Span<std::byte> memory = arguments.TakeWritable(
          Callable(function)(layer, FromEnum(v1::Tensor_descriptor(), tensor), size),
          {absl::StrCat("allocate: memory for layer ", layer), Byte(),
           Shape{static_cast<int64_t>(size)}, nullptr});
      bytes = {memory.data(), memory.size(), std::move(arguments).Owner()};
    });
    if (!status.ok()) return status;
    return bytes;
  };
}

client::ResultAllocator ReadAllocator(nb::handle options) {
  const nb::object allocate = options.attr("allocate");
  if (allocate.is_none()) return nullptr;
  if (nb::isinstance<ArenaHandle>(allocate)) {
    return client::AllocateFrom(nb::cast<const ArenaHandle&>(allocate).get());
  }
  return AllocatorOf(FunctionOf(options, "allocate"));
}

}  // namespace

client::ClientOptions ClientOptionsOf(nb::handle options) {
  client::ClientOptions result;
  Read(options, "idle_buffer_bytes", &result.idle_buffer_bytes);
  Read(options, "token", &result.token);
  Read(options, "user_agent", &result.user_agent);
  ReadSeconds(options, "keepalive_interval", &result.keepalive_interval);
  const nb::object tls = options.attr("tls");
  if (tls.is_none()) return result;
  grpc::SslCredentialsOptions ssl;
  Read(tls, "root_certificates", &ssl.pem_root_certs);
  Read(tls, "private_key", &ssl.pem_private_key);
  Read(tls, "certificate_chain", &ssl.pem_cert_chain);
  result.credentials = grpc::SslCredentials(ssl);
  return result;
}

client::StreamOptions StreamOptionsOf(nb::handle options) {
  client::StreamOptions result;
  ReadSeconds(options, "timeout", &result.timeout);
  Read(options, "chunk_bytes", &result.chunk_bytes);
  Read(options, "max_in_flight_bytes", &result.max_in_flight_bytes);
  Read(options, "max_buffered_result_bytes", &result.max_buffered_result_bytes);
  Read(options, "checksums", &result.checksums);
  result.retry = RetryOf(options);
  Read(options, "replica", &result.replica);
  result.transport = TransportOf(options);
  for (nb::handle region : options.attr("regions")) {
    result.regions.push_back(nb::cast<const RegionHandle&>(region).get());
  }
  result.staging = ArenaOf(options, "staging");
  Read(options, "copy_from_gpu", &result.copy_from_gpu);
  Read(options, "metadata", &result.metadata);
  ReadLabels(options, &result.labels);
  return result;
}

client::PromptOptions PromptOptionsOf(nb::handle options,
                                      const std::shared_ptr<const Prompt>& prompt) {
  client::PromptOptions result;
  result.allocate = ReadAllocator(options);
  result.results = ArenaOf(options, "results");
  if (Function rows = FunctionOf(options, "rows")) result.rows = RowsOf(std::move(rows), prompt);
  return result;
}

client::HeldCallOptions HeldCallOptionsOf(nb::handle options) {
  client::HeldCallOptions result;
  ReadCall(options, &result);
  return result;
}

client::FetchOptions FetchOptionsOf(nb::handle options, std::shared_ptr<absl::Status> taking) {
  client::FetchOptions result;
  ReadCall(options, &result);
  Read(options, "first_layer", &result.first_layer);
  Read(options, "layer_count", &result.layer_count);
  Read(options, "first_kv_head", &result.first_kv_head);
  Read(options, "kv_head_count", &result.kv_head_count);
  Read(options, "max_message_bytes", &result.max_message_bytes);
  Read(options, "checksums", &result.checksums);
  Read(options, "max_bytes", &result.max_bytes);
  result.retry = RetryOf(options);
  result.allocate = ReadAllocator(options);
  result.results = ArenaOf(options, "results");
  result.transport = TransportOf(options);
  if (Function on_layer = FunctionOf(options, "on_layer")) {
    const auto prompt = std::make_shared<Prompt>();
    if (result.results != nullptr) prompt->gpu.Add(*result.results->region());
    result.on_info = [prompt](const v1::CacheInfo& info) {
      prompt->open = client::OpenOf(info);
      prompt->opened = client::OpenedOf(info);
    };
    result.on_layer = [on_layer, prompt, taking = std::move(taking)](client::LayerResult layer) {
      if (!taking->ok()) return;
      *taking = Calling("on_layer", [&] { Callable(on_layer)(FromLayer(layer, *prompt)); });
    };
  }
  return result;
}

}  // namespace structkv::python
