// Messages of the public API and the dataclasses that stand for them (structkv/messages.py): one
// way of translating all of them, by the names of their fields.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "google/protobuf/message.h"

namespace structkv::python {

// Fills `message` from a dataclass of its name; None leaves a field unset. Throws InvalidArgument
// with the field, the value and what is allowed.
void ToMessage(nanobind::handle object, google::protobuf::Message* message);

template <typename Message>
Message MessageOf(nanobind::handle object) {
  Message message;
  ToMessage(object, &message);
  return message;
}

// A dataclass of the message's name; unset fields are None.
nanobind::object FromMessage(const google::protobuf::Message& message);

// An enum's values are strings: DTYPE_BF16 is "bf16", and DTYPE_UNSPECIFIED None.
nanobind::object FromEnum(const google::protobuf::EnumDescriptor* type, int number);
// Throws InvalidArgument, with `name` for the argument.
int ToEnum(const google::protobuf::EnumDescriptor* type, nanobind::handle value,
           const std::string& name);

}  // namespace structkv::python
