// Tensors on their way between Python and the library, without copies.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <functional>
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
// "[2, 100, 32]".
std::string Text(const Shape& shape);

// Why bytes in the memory of a GPU, by its number, cannot be taken; empty: they can.
using GpuRule = std::function<std::string(absl::Span<const std::byte> bytes, int device)>;

// What a tensor argument must be.
struct Expected {
  std::string name;  // for errors: "send_layer: keys of layer 3"
  const Element& element;
  std::optional<Shape> shape;  // nullopt: of any type and shape
  GpuRule gpu;                 // none: on the CPU
};

// Arguments of one call, and what keeps them alive.
class Arguments {
 public:
  // The bytes of `object`: a tensor by DLPack or the buffer protocol, dense, of the expected type
  // (or integers of its size, for its bits) and shape, but for leading axes of 1; or one axis of
  // bytes. On the CPU or, by DLPack, on a GPU as `expected.gpu` lets; nothing is waited for there.
  // Empty for None. Throws InvalidArgument with the name, what came and what is expected.
  absl::Span<const std::byte> Take(nanobind::handle object, const Expected& expected);
  // The same, on the CPU and of memory that may be written.
  absl::Span<std::byte> TakeWritable(nanobind::handle object, const Expected& expected);

  // Keeps what was taken alive; may be released on any thread. Null where nothing was.
  std::shared_ptr<const void> Owner() &&;
  // Of what was taken last: the number of its GPU; nullopt: it is on the CPU.
  std::optional<int> gpu() const { return gpu_; }

 private:
  std::vector<nanobind::ndarray<nanobind::ro>> arrays_;
  std::optional<int> gpu_;
};

// A result, or a block of an arena, as Python sees it.
struct Tensor {
  // `on`: the number of the GPU in whose memory it is; nullopt: it is on the CPU.
  Tensor(const client::Bytes& bytes, const Element& type, Shape dims, std::optional<int> on);

  absl::Span<std::byte> memory;
  Held<const void> owner;  // of a block's region for one, whose end waits for threads
  const Element& element;
  Shape shape;
  Shape strides;  // in bytes
  std::optional<int> gpu;
};

// None where there are no bytes.
nanobind::object TensorOrNone(const client::Bytes& bytes, const Element& element, Shape shape,
                              std::optional<int> gpu);

void BindTensor(nanobind::module_& module);

}  // namespace structkv::python
