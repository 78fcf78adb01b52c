// Options of structkv/options.py, read by the names of their fields; None leaves the C++ default.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "prompt.h"
#include "structkv/client.h"
#include "structkv/held_cache.h"
#include "structkv/options.h"

namespace structkv::python {

// Sets `value` from a field that is not None.
template <typename T>
void Read(nanobind::handle options, const char* name, T* value) {
  const nanobind::object field = nanobind::getattr(options, name);
  if (!field.is_none()) *value = nanobind::cast<T>(field);
}

client::ClientOptions ClientOptionsOf(nanobind::handle options);
client::StreamOptions StreamOptionsOf(nanobind::handle options);
client::HeldCallOptions HeldCallOptionsOf(nanobind::handle options);
// `taking`: becomes what on_layer raised; after that it is called no more.
client::FetchOptions FetchOptionsOf(nanobind::handle options, std::shared_ptr<absl::Status> taking);

// Without the functions that a session sets.
client::PromptOptions PromptOptionsOf(nanobind::handle options,
                                      const std::shared_ptr<const Prompt>& prompt);

}  // namespace structkv::python
