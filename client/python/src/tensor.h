// Tensors on their way between Python and the library, without copies.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "interpreter.h"
#include "structkv/bytes.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::python {

// An element type, little-endian.
struct Element {
  const char* name;    // as in messages.DType, "i32" or "u8"
  const char* format;  // in the buffer protocol, which has neither bf16 nor fp8: their bits
  nanobind::dlpack::dtype dtype;

  size_t bytes() const { return dtype.bits / 8; }
};

const Element& ElementOf(v1::DType dtype);
// Throws InvalidArgument.
const Element& ElementOf(const std::string& name);
const Element& Int32();
const Element& Float32();
const Element& Byte();

using Shape = std::vector<int64_t>;

// What a tensor argument must be.
struct Expected {
  std::string name;  // for errors: "send_layer: keys of layer 3"
  const Element& element;
  std::optional<Shape> shape;  // nullopt: of any type and shape
};

// Arguments of one call, and what keeps them alive.
class Arguments {
 public:
  // The bytes of `object`: a tensor on the CPU, by DLPack or the buffer protocol, dense, of the
  // expected type (or integers of its size, for its bits) and shape, but for leading axes of 1; or
  // one axis of bytes. Empty for None. Throws InvalidArgument with the name, what came and what is
  // expected.
  absl::Span<const std::byte> Take(nanobind::handle object, const Expected& expected);
  // The same, of memory that may be written.
  absl::Span<std::byte> TakeWritable(nanobind::handle object, const Expected& expected);

  // Keeps what was taken alive; may be released on any thread. Null where nothing was.
  std::shared_ptr<const void> Owner() &&;

 private:
  std::vector<nanobind::ndarray<nanobind::ro>> arrays_;
};

// A result, or a block of an arena, as Python sees it.
struct Tensor {
  Tensor(const client::Bytes& bytes, const Element& type, Shape dims);

  absl::Span<std::byte> memory;
  Held<const void> owner;  // of a block's region for one, whose end waits for threads
  const Element& element;
  Shape shape;
  Shape strides;  // in bytes
};

// None where there are no bytes.
nanobind::object TensorOrNone(const client::Bytes& bytes, const Element& element, Shape shape);

void BindTensor(nanobind::module_& module);

}  // namespace structkv::python
