#include "session.h"

#include <nanobind/stl/string.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "error.h"
#include "message.h"
#include "region.h"
#include "results.h"
#include "shapes.h"
#include "tensor.h"

namespace structkv::python {
namespace {

using PendingHandle = Held<Pending>;

// Sends on a thread without the GIL, behind what was sent before.
PendingHandle Send(const SessionHandle& self,
                   std::function<absl::Status(client::CompressSession&)> send) {
  return PendingHandle(
      Start(self->strand(),
            [session = self->shared_from_this(), send = std::move(send)]() -> Pending::Outcome {
              return [status = send(session->session())] {
                Check(status);
                return nb::none();
              };
            }));
}

// What a session takes from a GPU's memory.
GpuRule FromGpu(const Prompt& prompt, v1::Tensor which) {
  return [&prompt, which](absl::Span<const std::byte> bytes, int device) {
    return prompt.WhyNotFromGpu(which, bytes, device);
  };
}

// Tensors of one call that sends.
class Inputs {
 public:
  Inputs(const Session& session, std::string call, uint32_t tokens, bool whole)
      : prompt_(session.prompt()), call_(std::move(call)), tokens_(tokens), whole_(whole) {}

  absl::Span<const std::byte> Take(nb::handle object, v1::Tensor which) {
    return arguments_.Take(
        object,
        {absl::StrCat(call_, ": ", nb::cast<std::string>(FromEnum(v1::Tensor_descriptor(), which))),
         ElementOf(prompt_.open, which),
         InputShape(prompt_.open, prompt_.opened, which, tokens_, whole_),
         FromGpu(prompt_, which)});
  }
  std::shared_ptr<const void> Owner() { return std::move(arguments_).Owner(); }

 private:
  const Prompt& prompt_;
  const std::string call_;
  const uint32_t tokens_;
  const bool whole_;
  Arguments arguments_;
};

// Tokens of `positions`, by their bytes; whether these are i32, and may be on a GPU, is checked
// where they are taken.
uint32_t CountPositions(nb::handle positions) {
  Arguments arguments;
  const absl::Span<const std::byte> bytes =
      arguments.Take(positions, {"positions", Int32(), std::nullopt,
                                 [](absl::Span<const std::byte>, int) { return std::string(); }});
  const auto address = reinterpret_cast<uintptr_t>(bytes.data());
  if (address % alignof(int32_t) != 0) {
    Throw(absl::InvalidArgumentError(absl::StrCat("positions lie at the address ", address,
                                                  "; a multiple of ", alignof(int32_t),
                                                  " is expected")));
  }
  return static_cast<uint32_t>(bytes.size() / sizeof(int32_t));
}

// `tensors`: a LayerTensors.
PendingHandle SendLayer(const SessionHandle& self, uint32_t layer, nb::handle tensors) {
  const nb::object positions = tensors.attr("positions");
  const bool skeleton = !positions.is_none();
  Inputs inputs(*self.get(), absl::StrCat("layer ", layer),
                skeleton ? CountPositions(positions) : self->prompt().open.prompt_tokens(),
                /*whole=*/!skeleton);
  client::LayerTensors layer_tensors;
  // First, since the others' shapes follow from them.
  const absl::Span<const std::byte> rows = inputs.Take(positions, v1::TENSOR_POSITIONS);
  layer_tensors.keys = inputs.Take(tensors.attr("keys"), v1::TENSOR_KEYS);
  layer_tensors.values = inputs.Take(tensors.attr("values"), v1::TENSOR_VALUES);
  layer_tensors.window_queries =
      inputs.Take(tensors.attr("window_queries"), v1::TENSOR_WINDOW_QUERIES);
  layer_tensors.window_lse = inputs.Take(tensors.attr("window_lse"), v1::TENSOR_WINDOW_LSE);
  layer_tensors.saliency = inputs.Take(tensors.attr("saliency"), v1::TENSOR_SALIENCY);
  layer_tensors.key_scales = inputs.Take(tensors.attr("key_scales"), v1::TENSOR_KEY_SCALES);
  layer_tensors.value_scales = inputs.Take(tensors.attr("value_scales"), v1::TENSOR_VALUE_SCALES);
  layer_tensors.positions = {reinterpret_cast<const int32_t*>(rows.data()),
                             rows.size() / sizeof(int32_t)};
  layer_tensors.owner = inputs.Owner();
  layer_tensors.cuda_stream = StreamOf(tensors.attr("cuda_stream"), "LayerTensors.cuda_stream");
  return Send(self, [layer, layer_tensors](client::CompressSession& session) {
    return session.SendLayer(layer, layer_tensors);
  });
}

PendingHandle SendChunk(const SessionHandle& self, uint32_t layer, uint32_t first_token,
                        uint32_t tokens, nb::handle keys, nb::handle values) {
  Inputs inputs(*self.get(), absl::StrCat("layer ", layer), tokens, /*whole=*/false);
  client::ChunkTensors chunk;
  chunk.keys = inputs.Take(keys, v1::TENSOR_KEYS);
  chunk.values = inputs.Take(values, v1::TENSOR_VALUES);
  chunk.owner = inputs.Owner();
  return Send(self, [layer, first_token, tokens, chunk](client::CompressSession& session) {
    return session.SendChunk(layer, first_token, tokens, chunk);
  });
}

PendingHandle SendBytes(const SessionHandle& self, uint32_t layer, nb::handle tensor,
                        nb::handle data, uint64_t offset_bytes) {
  const auto which =
      static_cast<v1::Tensor>(ToEnum(v1::Tensor_descriptor(), tensor, "send: tensor"));
  Arguments arguments;
  const absl::Span<const std::byte> bytes =
      arguments.Take(data, {"send: data", Byte(), std::nullopt, FromGpu(self->prompt(), which)});
  return Send(self, [layer, which, bytes, offset_bytes,
                     owner = std::move(arguments).Owner()](client::CompressSession& session) {
    return session.Send(layer, which, bytes, offset_bytes, owner);
  });
}

nb::object NextEvent(const SessionHandle& self) {
  RefuseEnded();
  if (!self->events().Take()) return nb::none();
  // With the GIL: it does not wait, and a daemon thread that gives the GIL away may never return.
  return FromEvent(Take(self->session().NextEvent()), self->prompt());
}

}  // namespace

SessionHandle HandleOf(const std::shared_ptr<Session>& session) {
  return SessionHandle(
      {session.get(), [kept = std::shared_ptr<Session>(session)](Session*) mutable {
         kept->Cancel();
         kept.reset();
       }});
}

void BindSession(nb::module_& module) {
  nb::class_<SessionHandle>(module, "Session", "CompressSession; see structkv.Session.")
      .def_prop_ro(
          "open", [](const SessionHandle& self) { return FromMessage(self->prompt().open); },
          nb::sig("def open(self) -> typing.Any"))
      .def_prop_ro(
          "opened", [](const SessionHandle& self) { return FromMessage(self->prompt().opened); },
          nb::sig("def opened(self) -> typing.Any"))
      .def_prop_ro(
          "replica", [](const SessionHandle& self) { return self->session().replica(); },
          nb::sig("def replica(self) -> str"))
      .def("send_layer", &SendLayer, nb::arg("layer"), nb::arg("tensors"))
      .def("send_chunk", &SendChunk, nb::arg("layer"), nb::arg("first_token"), nb::arg("tokens"),
           nb::arg("keys").none(), nb::arg("values").none())
      .def("send", &SendBytes, nb::arg("layer"), nb::arg("tensor"), nb::arg("data"),
           nb::arg("offset_bytes"))
      .def("commit",
           [](const SessionHandle& self) {
             return Send(self, [](client::CompressSession& session) { return session.Commit(); });
           })
      .def("next_event", &NextEvent, nb::sig("def next_event(self) -> typing.Any"),
           "The next event; None where it did not come yet.")
      .def(
          "ready",
          [](const SessionHandle& self) {
            RefuseEnded();
            return PendingHandle(self->events().Ready());
          },
          "Finishes once next_event() has something to say.")
      .def(
          "cancel",
          [](const SessionHandle& self) {
            if (!Forked()) self->Cancel();
          },
          nb::call_guard<WithoutGil>(), "Ends the session as Cancelled.");
}

}  // namespace structkv::python
